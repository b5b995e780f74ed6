"""The schema of a training run, and how a recipe and a command line become one.

The defaults are the paper's ResNet-50 on ImageNet; a recipe in ``configs/`` lists only what differs. The docstring
under a field is its ``--help``.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import timm
import yaml
from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, set_parsing_settings

from mrl.errors import UserError
from mrl.matryoshka import check_nesting_list, check_weights

# timm's own parser accepts misspelled parts silently.
RAND_AUGMENT = re.compile(r"rand(-(m\d+|n[1-9]|p(0\.\d+|[01])|mstd\d+(\.\d+)?|mmax\d+|inc[01]|t(weights|3a|3aw)))*")


def _require(condition: bool, key: str, value: Any, allowed: str) -> None:
    if not condition:
        raise UserError(f"{key} is {value!r}; allowed: {allowed}")


def _require_at_least(low: int, section: str, config: Any, *keys: str) -> None:
    for key in keys:
        value = getattr(config, key)
        _require(value is None or value >= low, f"{section}.{key}", value, f"{low} or more")


def _require_utf_8(key: str, path: str | None) -> None:
    allowed = "a name in UTF-8, as config.yaml holds it; for a folder named otherwise, give a link to it (ln -s)"
    _require(path is None or path == path.encode(errors="replace").decode(), key, path, allowed)


def expand_home(argv: Sequence[str] | None) -> list[str]:
    """Return ``argv``, by default the command line's, with ``~`` expanded also in --out=~/x, where shells leave it."""
    words = sys.argv[1:] if argv is None else argv
    return [re.sub(r"(^|=)~(?=/|$)", lambda at: at[1] + os.path.expanduser("~"), word) for word in words]


def _expand(section: Any, key: str) -> None:
    """Expand ``~`` in a path of a section that is being made."""
    if isinstance(path := getattr(section, key), str):
        object.__setattr__(section, key, os.path.expanduser(path))


@dataclass(frozen=True)
class RunConfig:
    """Where the run lives and how it starts."""

    name: str = "resnet50_mrl"
    """Name of the run; its directory is <run.dir>/<run.name>."""
    dir: str = "runs"
    """Parent folder of the run directories."""
    seed: int = 0
    """Seed of the initial weights, the order of samples, their crops, and mixup."""
    resume: Literal["never", "auto"] = "never"
    """never: refuse a run directory that holds a checkpoint or other files. auto: continue from its last checkpoint, or
    start if there is none."""

    def __post_init__(self) -> None:
        _require_utf_8("run.name", self.name)
        _require_utf_8("run.dir", self.dir)
        _expand(self, "dir")
        fits = self.name not in ("", ".", "..", "trunk_cache") and "/" not in self.name
        _require(fits, "run.name", self.name, "a folder name without '/', not trunk_cache")
        _require(0 <= self.seed < 2**31, "run.seed", self.seed, "0 to 2147483647")


@dataclass(frozen=True)
class DataConfig:
    """Images, their order, and their augmentation."""

    name: Literal["imagenet", "tiny_imagenet", "digits", "folder"] = "imagenet"
    """imagenet, tiny_imagenet, folder: a folder with train/<class>/ and val/<class>/. imagenet also reads Kaggle's
    layout and a flat val/ with its ground truth (docs/IMAGENET.md). digits: scikit-learn's handwritten digits, no files
    needed."""
    root: str | None = None
    """Folder that holds train/ and val/, or train.beton and val.beton. Not used by digits."""
    val_share: float = 0.0
    """If data.root has no val/, hold out this share of the images of each class for validation; the classes may then
    also lie in data.root itself, without train/. Which images these are depends on their names alone, and held_out.json
    in the run directory lists them. Above 0 for data.name folder only. 0: val/ must be there."""
    backend: Literal["auto", "memory", "folder", "ffcv"] = "auto"
    """memory: decode every image once and keep it on the device at data.eval_resize_px square. folder: decode in worker
    processes as needed. ffcv: read train.beton and val.beton (python -m mrl.data.write_ffcv) in threads. auto: memory
    for digits and tiny_imagenet, else ffcv if its files exist and FFCV is installed, else folder; folder for
    data.rand_augment."""
    num_classes: int | None = None
    """Expected number of classes; another number in the data is an error. Default: any."""
    missing_classes: Literal["refuse", "allow"] = "refuse"
    """allow: go on if val has no images of a class, which the metrics then leave out, or if a class folder has none at
    all."""
    max_unreadable: float = 0.0
    """Share of the images of each split that may be unreadable. They are left out and listed in unreadable.txt in the
    run directory. Above 0, every image is decoded once at the start. python -m mrl.data.check DIR lists them too."""
    exif_rotation: Literal["apply", "ignore"] = "apply"
    """apply: turn images upright as their EXIF data say. ignore: take the pixels as stored, as models trained before
    this option did."""
    batch_size: int = 1024
    """Images per optimizer step, over all processes together (global). Divisible by processes x
    train.accumulation_steps."""
    min_steps_per_epoch: int = 1
    """Minimum number of steps per epoch. If data.batch_size would give fewer, the batch size is reduced (the learning
    rate is not), and a message says so."""
    num_workers: int | None = None
    """Decoding processes (folder backend) or threads (ffcv) per training process. Default: the CPU cores this
    process may use, without a GPU a quarter of them (none below 4), and the network computes with the others."""
    train_px: int | list[tuple[int, int]] = field(default_factory=lambda: [(0, 160), (32, 192)])
    """Side of training images in pixels: one number, or pairs of first epoch and pixels, e.g. [[0, 160], [32, 192]] for
    160 px, then 192 px from epoch 32 on. Default: that of the weights in model.init (timm's of the backbone for
    pretrained and weights files), else the paper's."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Random resized crop: smallest and largest share of the image's area."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Random resized crop: smallest and largest width / height."""
    flip: bool = True
    """Mirror half of the training images left to right."""
    rand_augment: str | None = None
    """timm's RandAugment of each crop, e.g. rand-m9-mstd0.5-inc1 (magnitude 9 with a std of 0.5); folder backend only.
    Default: off."""
    random_erasing: float = 0.0
    """Probability that a rectangle of a training image is replaced by noise (timm); 0 is off."""
    mixup: float = 0.0
    """Alpha of mixup (timm); 0 is off."""
    cutmix: float = 0.0
    """Alpha of cutmix (timm); 0 is off. With both on, each batch uses one of the two with equal probability."""
    eval_resize_px: int = 256
    """Evaluation: shorter side after resizing, in pixels. Default: as data.mean, in proportion to data.eval_px."""
    eval_px: int = 224
    """Evaluation: side of the center crop, in pixels. Default: as data.mean."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How images are resized for evaluation, and by the folder backend for training. Default: as data.mean."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Per-channel mean for normalization, on the scale 0 to 1. Default: that of the weights in model.init (of a run, or
    timm's of the backbone for pretrained and weights files), else ImageNet's."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Per-channel standard deviation for normalization, on the scale 0 to 1. Default: as data.mean."""

    def __post_init__(self) -> None:
        _require_utf_8("data.root", self.root)
        _require(0 <= self.max_unreadable < 1, "data.max_unreadable", self.max_unreadable, "0 to below 1")
        allowed = "0 to below 1" if self.name == "folder" else f"0 with data.name {self.name}"
        possible = 0 <= self.val_share < 1 and (self.name == "folder" or self.val_share == 0)
        _require(possible, "data.val_share", self.val_share, allowed)
        _require_at_least(1, "data", self, "batch_size", "min_steps_per_epoch")
        _require_at_least(0, "data", self, "num_workers", "mixup", "cutmix")
        _expand(self, "root")
        _require(self.root != "", "data.root", self.root, "the folder that holds train/ and val/")
        steps = [(0, self.train_px)] if isinstance(self.train_px, int) else self.train_px
        epochs = [epoch for epoch, _ in steps]
        possible = epochs[:1] == [0] and epochs == sorted(set(epochs)) and all(px >= 8 for _, px in steps)
        allowed = "8 or more pixels, or pairs [first epoch, pixels] in ascending order that begin with epoch 0"
        _require(possible, "data.train_px", self.train_px, allowed)
        low, high = self.crop_scale
        _require(0 < low <= high <= 1, "data.crop_scale", self.crop_scale, "0 < low <= high <= 1")
        low, high = self.crop_ratio
        _require(0 < low <= high, "data.crop_ratio", self.crop_ratio, "0 < low <= high")
        possible = self.rand_augment is None or bool(RAND_AUGMENT.fullmatch(self.rand_augment))
        allowed = "null, or rand followed by any of -m9 (magnitude), -n2 (operations), -p0.5 (chance of each), "
        allowed += "-mstd0.5 (std of the magnitude), -mmax10, -inc1 (harder with the magnitude), -tweights, -t3a, -t3aw"
        _require(possible, "data.rand_augment", self.rand_augment, allowed)
        _require(0 <= self.random_erasing <= 1, "data.random_erasing", self.random_erasing, "0 to 1")
        allowed = f"8 to data.eval_resize_px = {self.eval_resize_px}"
        _require(8 <= self.eval_px <= self.eval_resize_px, "data.eval_px", self.eval_px, allowed)
        scale = "(white is 1, not 255)"
        _require(all(0 <= m <= 1 for m in self.mean), "data.mean", self.mean, f"numbers from 0 to 1 {scale}")
        _require(all(0 < s <= 1 for s in self.std), "data.std", self.std, f"numbers above 0, up to 1 {scale}")

    def px_at(self, epoch: int) -> int:
        """Return the side of training images in pixels during ``epoch``.

        >>> [DataConfig(train_px=[(0, 160), (32, 192)]).px_at(epoch) for epoch in (0, 31, 32, 39)]
        [160, 160, 192, 192]
        """
        if isinstance(self.train_px, int):
            return self.train_px
        return [px for first_epoch, px in self.train_px if first_epoch <= epoch][-1]


@dataclass(frozen=True)
class ModelConfig:
    """The backbone, whose pooled output is the embedding."""

    backbone: str = "resnet50"
    """Any timm model name."""
    init: str = "scratch"
    """scratch: random weights. pretrained: timm's weights (downloaded). Otherwise a path to a weights file
    (.safetensors, .pt) or a run directory."""
    blurpool: bool = False
    """Blur before every strided convolution of 16 or more input channels, as FFCV does (not timm's resnetblur50). Part
    of the paper's ResNet recipes."""
    stem_stride: Literal[4, 2, 1] = 4
    """ResNets: how much the stem shrinks an image. 4: as published. 2: no max-pool. 1: also no stride in the first
    convolution, for images of 64 px and less."""
    trainable: Literal["all", "head"] | list[str] = "all"
    """all, head, or the backbone modules to train besides the head, e.g. [layer4.2]. The rest is frozen, with its
    BatchNorm in eval mode."""
    projection: bool = False
    """Put a new linear layer, D to D, after the backbone's pooling; it is trained, and its output is the embedding.
    Pooled activations are never negative; after this layer they can be, so a small prefix can hold more. Use about
    a quarter of the learning rate. docs/RESULTS.md tells where it helped and what it cost."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of timm.create_model, e.g. {drop_path_rate: 0.1, img_size: 64, patch_size: 8}."""

    def __post_init__(self) -> None:
        _expand(self, "init")


@dataclass(frozen=True)
class HeadConfig:
    """The nested classifier. Plain, fixed-feature (FF), MRL, and MRL-E models are values of these fields."""

    nesting_list: Literal["auto"] | list[int] = "auto"
    """Trained prefix dims, ascending, full width last. auto: halve the width down to 8 or just above (2048: 8..2048;
    768: 12..768). A single dim d is the fixed-feature model FF-d."""
    tied: bool = False
    """Share one classifier between all dims (MRL-E) instead of one each (MRL)."""
    scaled: bool = False
    """With head.tied: learn a scale for each dim's logits, and divide the gradient of each column of the classifier by
    the number of dims that use it (which AdamW does not notice). Not in the paper; docs/RESULTS.md tells what it
    gains and costs."""
    weights: list[float] | None = None
    """Weight of each dim's loss in the sum, smallest dim first. Default: 1 each."""
    self_distillation: float = 0.0
    """Weight of self-distillation: this many times the KL divergence of a dim's prediction from that of the full width
    is added to its loss. 0, as in the paper: off. docs/RESULTS.md tells what 1 gained."""

    def __post_init__(self) -> None:
        if self.nesting_list != "auto":
            check_weights(self.weights, check_nesting_list(self.nesting_list))
        _require(self.tied or not self.scaled, "head.scaled", self.scaled, "false unless head.tied is true")
        _require_at_least(0, "head", self, "self_distillation")


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and schedules, for the global batch size, whatever the number of processes."""

    name: Literal["sgd", "adamw"] = "sgd"
    """sgd (momentum, not Nesterov) or adamw."""
    lr: float = 0.425
    """Peak learning rate for data.batch_size as given; never rescaled."""
    momentum: float = 0.9
    """SGD momentum; not used by adamw."""
    weight_decay: float = 1e-4
    """Weight decay, only on parameters with more than one dimension (not on biases, norms, position embeddings)."""
    layer_decay: float = 1.0
    """Layer-wise learning rate decay for fine-tuning: each backbone layer learns at this times the rate of the layer
    above it, the head at optim.lr; e.g. 0.75. 1 is off."""
    warmup_epochs: float = 2.0
    """Epochs of linear warm-up from 0; if train.epochs is not longer, half of it is used."""
    schedule: Literal["linear", "cosine"] = "linear"
    """Decay from the peak toward 0, which the step after the last would have; updated every step."""
    clip_norm: float = 0.0
    """Maximum gradient norm; larger gradients are scaled down. 0 is off."""

    def __post_init__(self) -> None:
        _require(self.lr > 0, "optim.lr", self.lr, "above 0")
        _require(0 <= self.momentum < 1, "optim.momentum", self.momentum, "0 to below 1")
        _require_at_least(0, "optim", self, "weight_decay", "warmup_epochs", "clip_norm")
        _require(0 < self.layer_decay <= 1, "optim.layer_decay", self.layer_decay, "above 0, up to 1 (off)")


@dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    epochs: int = 40
    """Passes over the training set; the last incomplete batch of each is dropped."""
    label_smoothing: float = 0.1
    """Label smoothing inside the cross-entropy of every dim."""
    accumulation_steps: int = 1
    """Micro-batches per optimizer step; each process computes batch_size / processes / accumulation_steps images at a
    time."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Precision of the forward pass (autocast); fp16 adds loss scaling. On CPUs without bfloat16, fp32 is faster."""
    gradient_precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the gradient all-reduce; bf16 halves the traffic, for slow networks."""
    sync_batchnorm: bool = False
    """Synchronize BatchNorm statistics over all processes (GPUs only); for few images per GPU."""
    cache_views: int = 0
    """Compute the frozen layers before those of model.trainable once, for this many crops and flips of every training
    image: epoch e reads those of epoch e modulo this number. They are stored in <run.dir>/trunk_cache, for all runs
    with the same frozen layers. 0 is off."""
    cache_seed: int | None = None
    """Seed of the random crops and flips. Runs of several seeds can share cached layers if they give the same one.
    Default: run.seed."""
    compile: bool = False
    """Compile the model with torch.compile; if that fails, the run ends and says so."""
    ema_decay: float = 0.0
    """Decay per step of an exponential moving average of the weights; 0 is off. The average is saved, and validated
    beside the weights themselves. In the first steps the decay is lower: 1 - (1 + step)^(-2/3) (timm's warm-up)."""
    eval_every_epochs: int = 1
    """Epochs between two validations; the last epoch is always validated."""
    checkpoint_minutes: float = 15.0
    """Minutes between two checkpoints (checkpoints/last.pt), also in mid-epoch; every epoch ends with one too."""
    log_every_steps: int = 50
    """Steps between two rows of metrics.jsonl and of W&B."""
    profile_steps: int = 0
    """Steps to profile soon after the start: write trace.json.gz to the run directory and print where the time goes. 0
    is off."""

    def __post_init__(self) -> None:
        _require_at_least(1, "train", self, "epochs", "accumulation_steps", "eval_every_epochs", "log_every_steps")
        _require_at_least(0, "train", self, "checkpoint_minutes", "profile_steps", "cache_seed")
        _require(0 <= self.label_smoothing < 1, "train.label_smoothing", self.label_smoothing, "0 to below 1")
        _require(0 <= self.ema_decay < 1, "train.ema_decay", self.ema_decay, "0 (off) to below 1")
        allowed = f"0 (off) to train.epochs = {self.epochs}"
        _require(0 <= self.cache_views <= self.epochs, "train.cache_views", self.cache_views, allowed)


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases."""

    mode: Literal["disabled", "offline", "online"] = "disabled"
    """disabled, online (needs a login), or offline (written to the run directory, for `wandb sync` later)."""
    project: str = "mrl"
    """W&B project."""
    entity: str | None = None
    """W&B team or user. Default: your own."""


@dataclass(frozen=True)
class Config:
    """Everything a run depends on; saved with all defaults as config.yaml in the run directory."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        for section in dataclasses.fields(self):
            for key, value in vars(getattr(self, section.name)).items():
                numbers = [x for x in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(x, float)]
                _require(all(map(math.isfinite, numbers)), f"{section.name}.{key}", value, "finite numbers")
        data, views = self.data, self.train.cache_views
        if views:
            allowed = "head, or the last modules of the backbone, with train.cache_views"
            _require(self.model.trainable != "all", "model.trainable", "all", allowed)
            for key in ("mixup", "cutmix", "random_erasing"):
                _require(getattr(data, key) == 0, f"data.{key}", getattr(data, key), "0 with train.cache_views")
            px = [data.px_at(epoch) for epoch in range(self.train.epochs)]
            allowed = "sizes that repeat with the views, or train.cache_views = train.epochs"
            _require(all(a == b for a, b in zip(px, px[views:], strict=False)), "data.train_px", data.train_px, allowed)


RECIPES = Path(__file__).resolve().parent.parent / "configs"


def parse_command_line(argv: Sequence[str] | None, description: str) -> Config:
    """Return the `Config` of ``--config recipe.yaml --section.key value ...``; later arguments win."""
    found = list(sys.argv[1:] if argv is None else argv)
    for i, word in enumerate(found):
        if word.startswith("--config="):
            found[i] = "--config=" + find_recipe(word.removeprefix("--config="))
        elif word == "--config" and i + 1 < len(found):
            found[i + 1] = find_recipe(found[i + 1])
    return _parse(description, found)


def read_config(path: str | Path, settings: Sequence[str] = ()) -> Config:
    """Return the `Config` in a YAML file such as a run directory's config.yaml, with changes as on a command line."""
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist, so there is no run configuration to read")
    return _parse("", ["--config", str(path), *settings])


def to_yaml(config: Config) -> str:
    """Return every field of ``config`` as YAML, defaults included."""
    # By way of JSON, which has lists but no tuples.
    return yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(config))), sort_keys=False)


def find_recipe(name: str) -> str:
    """Return the path of a recipe given as a path or as a name in ``configs/``, with or without ``.yaml``."""
    for path in (Path(name).expanduser(), RECIPES / name, RECIPES / f"{name}.yaml"):
        if path.is_file():
            return str(path)
    known = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml"))) or "none"
    raise UserError(f"--config {name!r} is neither a file nor a recipe in {RECIPES}; recipes: {known}")


def _parse(description: str, argv: Sequence[str]) -> Config:
    # Reading the help texts takes half of the time.
    set_parsing_settings(docstring_parse_attribute_docstrings=not {"-h", "--help"}.isdisjoint(argv))
    # The formatter keeps the line breaks of the description, so that its examples can be copied.
    formatter = type("Formatter", (argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter), {})
    usage = "train.py [--config RECIPE] [--section.key VALUE ...]"
    how: dict[str, Any] = {"formatter_class": formatter, "exit_on_error": False, "allow_abbrev": False}
    parser = ArgumentParser(prog="train.py", usage=usage, description=description, **how)
    parser.add_argument("--config", action="config", help="a YAML recipe: a path, or a name in configs/")
    sections = {section.name: section.default_factory for section in dataclasses.fields(Config)}
    for name, section in sections.items():
        parser.add_class_arguments(section, name)
    try:
        namespace = parser.parse_args(argv)
        own = {"eval_px": DataConfig.eval_px, "eval_resize_px": DataConfig.eval_resize_px}
        own |= images_of_weights(namespace.model.backbone, os.path.expanduser(namespace.model.init))
        parser.set_defaults({f"data.{key}": value for key, value in own.items()})
        shrink = parser.parse_args(argv).data.eval_px / own["eval_px"]
        parser.set_defaults({"data.eval_resize_px": round(shrink * own["eval_resize_px"])})
        namespace = parser.parse_args(argv)
        namespace = parser.instantiate(namespace)
    except ArgumentError as error:
        message = " ".join(str(error).split())
        settings = {f"{name}.{f.name}": f for name, section in sections.items() for f in dataclasses.fields(section)}  # type: ignore[arg-type]
        if unknown := re.search(r"(?:arguments: --|Key '|[Oo]ption ')([\w.]+)", message):
            close = difflib.get_close_matches(unknown[1], settings, n=3, cutoff=0.5)
            message += f"; did you mean {' or '.join(close)}?" if close else ""
        raise UserError(message + _as_yaml(argv, message, settings)) from error
    return Config(**{name: namespace[name] for name in sections})


def _as_yaml(argv: Sequence[str], message: str, settings: dict[str, Any]) -> str:
    """Return how a list or dict that jsonargparse refuses in ``message`` is written on the command line, or ""."""
    for key, given in re.findall(r"--([\w.]+)[\0=](.*?)(?=\0--[a-z]|$)", "\0".join(argv)):
        kind = str(settings[key].type) if key in settings else ""
        refused = f'"{key}"' in message or ("nrecognized" in message and "\0" in given)
        if not refused or not re.search("list|tuple|dict", kind):
            continue
        items = re.findall(r"[^\s\0,()\[\]{}'\"]+", given)
        form = f"[{', '.join(items)}]"
        if "dict" in kind:
            pairs = re.findall(r"(\w+)[=:\s\0]+([^,}\s\0]+)", given)
            form = "{" + ", ".join(map(": ".join, pairs)) + "}"
        elif "list[tuple" in kind:
            form = "[[0, 160], [32, 192]]"
        elif "tuple" in kind and len(items) != len(settings[key].default):
            form = str(list(settings[key].default))
        return f"; write it as one word in YAML: --{key} '{form}'" if form != given else ""
    return ""


def images_of_weights(backbone: str, init: str) -> dict[str, Any]:
    """Return the settings of `DataConfig` with which the weights in ``model.init`` were trained; {} if not known.

    Those of a run are in its model.json, those of timm's and other weights files in timm's description of the backbone.
    """
    if init == "scratch":
        return {}
    try:
        if init != "pretrained" and Path(init).is_dir():
            info = json.loads((Path(init) / "model.json").read_text())
            mean, std, interpolation = info["mean"], info["std"], info.get("interpolation", "bilinear")
            sizes = {"eval_px": info["crop_px"], "eval_resize_px": info["resize_px"]}
        elif described := timm.get_pretrained_cfg(backbone):
            mean, std, interpolation = described.mean, described.std, described.interpolation
            interpolation = "bilinear" if interpolation == "bilinear" else "bicubic"
            px = described.input_size[-1]
            sizes = {"train_px": px, "eval_px": px, "eval_resize_px": max(px, math.floor(px / described.crop_pct))}
        else:
            return {}
        return {"mean": mean, "std": std, "interpolation": interpolation, **sizes}
    except (OSError, ValueError, KeyError, RuntimeError):  # such a run or backbone is refused when the model is built
        return {}
