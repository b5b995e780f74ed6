"""The whole schema of a training run; the defaults are the paper's ResNet-50 on ImageNet.

A recipe in ``configs/`` lists only what differs. The docstring under each field is its ``--help``.

From a recipe and a command line to a `Config`, and back to a file.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from mrl.errors import UserError
from mrl.matryoshka import check_nesting_list, check_weights

# timm's own parser takes misspelt parts in silence.
RAND_AUGMENT = re.compile(r"rand(-(m\d+|n[1-9]|p(0?\.\d+|[01])|mstd\d+(\.\d+)?|mmax\d+|inc[01]|t(weights|3a|3aw)))*")


def _require(condition: bool, key: str, value: Any, allowed: str) -> None:
    if not condition:
        raise UserError(f"{key} is {value!r}; allowed: {allowed}")


@dataclass(frozen=True)
class RunConfig:
    """Where the run lives and how it starts."""

    name: str = "resnet50_mrl"
    """Name of the run; its directory is <run.dir>/<run.name>."""
    dir: str = "runs"
    """Folder that holds run directories."""
    seed: int = 0
    """Seed of the initial weights, the order of samples, their crops, and mixup."""
    resume: Literal["never", "auto"] = "never"
    """never: refuse a run directory that already exists. auto: go on from its last checkpoint, or start if there
    is none."""

    def __post_init__(self) -> None:
        _require(bool(self.name) and "/" not in self.name, "run.name", self.name, "a folder name without '/'")
        _require(0 <= self.seed < 2**31, "run.seed", self.seed, "0 to 2147483647")


@dataclass(frozen=True)
class DataConfig:
    """Images, their order and their augmentation."""

    name: Literal["imagenet", "tiny_imagenet", "digits", "folder"] = "imagenet"
    """imagenet, tiny_imagenet, folder: a folder with train/<class>/ and val/<class>/. imagenet: Kaggle's layout too, or
    val/ as one flat folder with its ground truth (docs/IMAGENET.md). digits: scikit-learn's handwritten digits, no
    files needed."""
    root: str | None = None
    """Folder that holds train/ and val/, or train.beton and val.beton. Not used by digits."""
    backend: Literal["auto", "memory", "folder", "ffcv"] = "auto"
    """memory: every image decoded once, kept on the device at data.eval_resize_px square. folder: decoded in
    worker processes as needed. ffcv: train.beton and val.beton (python -m mrl.data.write_ffcv), decoded in threads.
    auto: memory for digits and tiny_imagenet, else ffcv if those files are there and FFCV is installed, else
    folder."""
    num_classes: int | None = None
    """Number of classes to expect; a different number in the data is an error. Default: take what is there."""
    batch_size: int = 1024
    """Images per optimizer step, over all processes together (global). Divisible by processes x
    train.accumulation_steps."""
    num_workers: int | None = None
    """Decoding processes (folder backend) or threads (ffcv) per training process. Default: the CPU cores this
    process may use."""
    train_px: int | list[tuple[int, int]] = field(default_factory=lambda: [(0, 160), (32, 192)])
    """Side of a training image in pixels: one number, or pairs of first epoch and pixels, e.g. [[0, 160], [32, 192]]
    for 160 px at first and 192 px from epoch 32 on."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Random resized crop: smallest and largest share of the image's area. (1, 1) with crop_ratio (1, 1) crops
    nothing of a square image."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Random resized crop: smallest and largest width / height."""
    flip: bool = True
    """Mirror half of the training images left to right."""
    rand_augment: str | None = None
    """timm's RandAugment of each crop, e.g. rand-m9-mstd0.5-inc1 (magnitude 9 with a spread of 0.5); not with the
    memory backend. Default: off."""
    random_erasing: float = 0.0
    """Share of training images in which a rectangle is replaced by noise (timm); 0 is off."""
    mixup: float = 0.0
    """Alpha of mixup (timm); 0 is off."""
    cutmix: float = 0.0
    """Alpha of cutmix (timm); 0 is off. With both on, each batch takes one of the two at even odds."""
    eval_resize_px: int = 256
    """Evaluation: shorter side after resizing, in pixels."""
    eval_px: int = 224
    """Evaluation: side of the center crop, in pixels."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of red, green, blue (scale 0 to 1) that normalization takes away."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Standard deviation of red, green, blue (scale 0 to 1) that normalization divides by."""

    def __post_init__(self) -> None:
        _require(self.batch_size >= 1, "data.batch_size", self.batch_size, "1 or more")
        _require(self.num_workers is None or self.num_workers >= 0, "data.num_workers", self.num_workers, "0 or more")
        steps = [(0, self.train_px)] if isinstance(self.train_px, int) else self.train_px
        epochs = [epoch for epoch, _ in steps]
        _require(
            epochs[:1] == [0] and epochs == sorted(set(epochs)) and all(px >= 8 for _, px in steps),
            "data.train_px",
            self.train_px,
            "8 or more pixels, or pairs [first epoch, pixels] in ascending order that begin with epoch 0",
        )
        low, high = self.crop_scale
        _require(0 < low <= high <= 1, "data.crop_scale", self.crop_scale, "0 < low <= high <= 1")
        low, high = self.crop_ratio
        _require(0 < low <= high, "data.crop_ratio", self.crop_ratio, "0 < low <= high")
        _require(
            self.rand_augment is None or bool(RAND_AUGMENT.fullmatch(self.rand_augment)),
            "data.rand_augment",
            self.rand_augment,
            "null, or rand followed by any of -m9 (magnitude), -n2 (operations), -p0.5 (chance of each), -mstd0.5 "
            "(spread of the magnitude), -mmax10, -inc1 (harder with the magnitude), -tweights, -t3a, -t3aw",
        )
        _require(0 <= self.random_erasing <= 1, "data.random_erasing", self.random_erasing, "0 to 1")
        _require(self.mixup >= 0, "data.mixup", self.mixup, "0 or more")
        _require(self.cutmix >= 0, "data.cutmix", self.cutmix, "0 or more")
        _require(
            8 <= self.eval_px <= self.eval_resize_px,
            "data.eval_px",
            self.eval_px,
            f"8 to data.eval_resize_px = {self.eval_resize_px}",
        )


@dataclass(frozen=True)
class ModelConfig:
    """The backbone, whose pooled output is the embedding."""

    backbone: str = "resnet50"
    """Any timm model name."""
    init: str = "scratch"
    """scratch: random weights. pretrained: timm's weights (downloaded). Otherwise the path of a weights file
    (.safetensors, .pt) or a run directory."""
    blurpool: bool = True
    """Blur before every strided convolution of 16 channels or more, as FFCV does (not timm's resnetblur50)."""
    stem_stride: Literal[4, 2, 1] = 4
    """ResNets: how much the stem shrinks an image. 4: as published. 2: no max-pool. 1: no max-pool and a first
    convolution of stride 1, for images of 64 px and less."""
    trainable: Literal["all", "head"] | list[str] = "all"
    """all, head, or the backbone modules to train beside the head, e.g. [layer4.2]. The rest is frozen, its
    BatchNorm in eval mode."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of timm.create_model, e.g. {drop_path_rate: 0.1, img_size: 64, patch_size: 8}."""


@dataclass(frozen=True)
class HeadConfig:
    """The nested classifier: plain, fixed-feature, MRL and MRL-E are values of these fields."""

    nesting_list: Literal["auto"] | list[int] = "auto"
    """Trained prefix sizes, ascending, full width last. auto: halve the width down to 8 or just above (2048:
    8..2048; 768: 12..768). One size d is the fixed-feature model FF-d."""
    tied: bool = False
    """One classifier shared by all sizes (MRL-E) instead of one each (MRL)."""
    weights: list[float] | None = None
    """Weight of each size's loss in the sum, smallest size first. Default: 1 each."""

    def __post_init__(self) -> None:
        if self.nesting_list != "auto":
            dims = check_nesting_list(self.nesting_list)
            check_weights(self.weights, dims)


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and schedules, written for the global batch size: the number of processes changes nothing."""

    name: Literal["sgd", "adamw"] = "sgd"
    """sgd (momentum, not Nesterov) or adamw."""
    lr: float = 0.425
    """Peak learning rate for data.batch_size as given; never rescaled."""
    momentum: float = 0.9
    """SGD momentum; not used by adamw."""
    weight_decay: float = 1e-4
    """Weight decay, on parameters with more than one dimension only (no biases, norms, position embeddings)."""
    layer_decay: float = 1.0
    """Fine-tuning: the learning rate of each layer of the backbone is this times that of the layer above it, the
    head's being optim.lr; e.g. 0.75. 1 is off."""
    warmup_epochs: float = 2.0
    """Epochs of linear warm-up from 0."""
    schedule: Literal["linear", "cosine"] = "linear"
    """Shape of the fall from the peak to 0 at the last step; the rate changes every step."""
    clip_norm: float = 0.0
    """Largest gradient norm, larger ones are scaled down; 0 is off."""

    def __post_init__(self) -> None:
        _require(self.lr > 0, "optim.lr", self.lr, "above 0")
        _require(0 <= self.momentum < 1, "optim.momentum", self.momentum, "0 to below 1")
        _require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "0 or more")
        _require(0 < self.layer_decay <= 1, "optim.layer_decay", self.layer_decay, "above 0, up to 1 (off)")
        _require(self.warmup_epochs >= 0, "optim.warmup_epochs", self.warmup_epochs, "0 or more")
        _require(self.clip_norm >= 0, "optim.clip_norm", self.clip_norm, "0 (off) or more")


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    epochs: int = 40
    """Passes over the training set; the last, incomplete batch of each pass is left out."""
    label_smoothing: float = 0.1
    """Share of each target spread over all classes, inside the cross-entropy of every size."""
    accumulation_steps: int = 1
    """Micro-batches per optimizer step; each process works on batch_size / processes / accumulation_steps images
    at a time."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Arithmetic of the forward pass (autocast); fp16 adds loss scaling. On CPUs without bfloat16 fp32 is faster."""
    gradient_precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic in which processes add up their gradients; bf16 halves what they send, for slow networks."""
    sync_batchnorm: bool = False
    """BatchNorm over the images of all processes, not of each on its own; GPUs only. For few images per GPU."""
    compile: bool = False
    """torch.compile the model; where a first step fails to compile the run says so and goes on without."""
    ema_decay: float = 0.0
    """Decay per step of an exponential moving average of the weights, which is then evaluated and saved; 0 is off."""
    eval_every_epochs: int = 1
    """Validate after every so many epochs, and always after the last."""
    checkpoint_minutes: float = 15.0
    """Save checkpoints/last.pt at least this often, also in mid-epoch; it is saved after every epoch too."""
    log_every_steps: int = 50
    """Steps between two rows of metrics.jsonl and W&B."""
    profile_steps: int = 0
    """Steps to profile soon after the start: writes trace.json.gz into the run directory and prints where the time
    of a step goes; 0 is off."""

    def __post_init__(self) -> None:
        _require(self.epochs >= 1, "train.epochs", self.epochs, "1 or more")
        _require(0 <= self.label_smoothing < 1, "train.label_smoothing", self.label_smoothing, "0 to below 1")
        _require(self.accumulation_steps >= 1, "train.accumulation_steps", self.accumulation_steps, "1 or more")
        _require(0 <= self.ema_decay < 1, "train.ema_decay", self.ema_decay, "0 (off) to below 1")
        _require(self.eval_every_epochs >= 1, "train.eval_every_epochs", self.eval_every_epochs, "1 or more")
        _require(self.checkpoint_minutes >= 0, "train.checkpoint_minutes", self.checkpoint_minutes, "0 or more")
        _require(self.log_every_steps >= 1, "train.log_every_steps", self.log_every_steps, "1 or more")
        _require(self.profile_steps >= 0, "train.profile_steps", self.profile_steps, "0 (off) or more")


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases."""

    mode: Literal["disabled", "offline", "online"] = "disabled"
    """disabled: not used. offline: written below the run directory, to `wandb sync` later. online: needs a login."""
    project: str = "mrl"
    """W&B project."""
    entity: str | None = None
    """W&B team or user. Default: your own."""


@dataclass(frozen=True)
class Config:
    """Everything a run depends on. Saved resolved as config.yaml in the run directory."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        _require(
            self.optim.warmup_epochs < self.train.epochs,
            "optim.warmup_epochs",
            self.optim.warmup_epochs,
            f"0 to below train.epochs = {self.train.epochs}, or the learning rate would end at its peak",
        )


RECIPES = Path(__file__).resolve().parent.parent / "configs"


def _parser(description: str) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    usage = "train.py [--config RECIPE] [--section.key VALUE ...]"
    parser = ArgumentParser(
        prog="train.py", usage=usage, description=description, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="a YAML recipe: a path, or a name in configs/")
    for section in dataclasses.fields(Config):
        parser.add_class_arguments(section.default_factory, section.name)
    return parser


def _parse(description: str, words: Sequence[str]) -> Config:
    parser = _parser(description)
    try:
        namespace = parser.instantiate(parser.parse_args(words))
    except ArgumentError as error:
        raise UserError(_sentence(str(error))) from error
    return Config(**{section.name: namespace[section.name] for section in dataclasses.fields(Config)})


def _sentence(message: str) -> str:
    """A parser's message on one line, with the keys that an unknown one may stand for."""
    known = [f"{section.name}.{f.name}" for section in dataclasses.fields(Config) for f in _fields_of(section)]
    unknown = re.search(r"(?:arguments: --|Key '|[Oo]ption ')([\w.]+).*", message)
    close = difflib.get_close_matches(unknown[1], known, n=3, cutoff=0.5) if unknown else []
    return " ".join(message.split()) + (f"; did you mean {' or '.join(close)}?" if close else "")


def _fields_of(section: dataclasses.Field) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(section.default_factory)  # type: ignore[arg-type]


def find_recipe(name: str) -> str:
    """The path of a recipe given as a path or as a name in ``configs/``, with or without ``.yaml``.

    Raises:
        UserError: There is no such file; the message lists the recipes there are.
    """
    for path in (Path(name), RECIPES / name, RECIPES / f"{name}.yaml"):
        if path.is_file():
            return str(path)
    known = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml"))) or "none"
    raise UserError(f"--config {name!r} is neither a file nor a recipe in {RECIPES}; recipes: {known}")


def _find_recipes(argv: Sequence[str]) -> list[str]:
    found = list(argv)
    for i, word in enumerate(found):
        if word.startswith("--config="):
            found[i] = "--config=" + find_recipe(word.removeprefix("--config="))
        elif word == "--config" and i + 1 < len(found):
            found[i + 1] = find_recipe(found[i + 1])
    return found


def parse_command_line(argv: Sequence[str] | None, description: str) -> Config:
    """The `Config` of ``--config recipe.yaml --section.key value ...``; later words win.

    Raises:
        UserError: There is no such recipe, a key is unknown, a value has the wrong type or is
            impossible; the sentence names the dotted key and what is allowed.
    """
    return _parse(description, _find_recipes(sys.argv[1:] if argv is None else argv))


def read_config(path: str | Path) -> Config:
    """The `Config` in a YAML file such as a run directory's config.yaml.

    Raises:
        UserError: There is no such file, or as `parse_command_line`.
    """
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist, so there is no run configuration to read")
    return _parse("", ["--config", str(path)])


def to_yaml(config: Config) -> str:
    """Every field of ``config`` as YAML, defaults included."""
    # By way of JSON, which knows lists but no tuples.
    return yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(config))), sort_keys=False)
