"""A timm backbone with a nested head: build, freeze, save, load, encode."""

from __future__ import annotations

import dataclasses
import difflib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from huggingface_hub import ModelHubMixin, snapshot_download
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torchvision.transforms import v2

from mrl.errors import UserError
from mrl.matryoshka import NestedLinear, check_nesting_list, default_nesting_list, prefix, unit_prefix
from mrl.rgb import to_rgb
from mrl.rundir import atomic_write, atomic_write_text

FORMAT_VERSION = 1
HUB_FILES = ("model.safetensors", "model.json", "config.json", "README.md")
PAPER = "https://arxiv.org/abs/2205.13147"
# The model card of a model that is pushed without its own.
PLAIN_CARD = """---
{{ card_data }}
---

Every prefix of this model's image embeddings is an embedding too
([Matryoshka Representation Learning]({{ paper_url }})): cut it, then normalize it. `model.json` lists the trained
sizes, the classes, and how images are prepared.
"""
# Arguments of timm.create_model that model.kwargs must not hold, and the setting to use instead.
SET_ELSEWHERE = {"pretrained": "model.init", "checkpoint_path": "model.init", "num_classes": "the classes of the data"}


@dataclass(frozen=True)
class ModelInfo:
    """Everything needed to rebuild a model and to feed it, beside its weights: the content of model.json."""

    backbone: str
    kwargs: dict[str, Any]
    stem_stride: int
    blurpool: bool
    nesting_list: tuple[int, ...]
    tied: bool
    classes: tuple[str, ...]
    resize_px: int
    crop_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    exif_rotation: str = "ignore"  # of models that were saved before this key
    interpolation: str = "bilinear"
    projection: bool = False
    scaled: bool = False
    format_version: int = FORMAT_VERSION


class MatryoshkaClassifier(
    nn.Module,
    ModelHubMixin,
    paper_url=PAPER,
    model_card_template=PLAIN_CARD,
    pipeline_tag="image-feature-extraction",
    tags=["matryoshka", "image-feature-extraction"],
):
    """Map images ``(B, 3, H, W)`` to logits ``(G, B, C)``: a backbone's pooled output, read by a nested head.

    A loaded model has the Hub's methods ``from_pretrained``, ``save_pretrained`` and ``push_to_hub``. If it was loaded
    with a model card, such as the one of ``python -m mrl.export hub``, it keeps that.
    """

    _info: ModelInfo | None = None
    card: str | None = None

    def __init__(self, backbone: nn.Module, head: NestedLinear):
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.width: int = backbone.head_hidden_size  # type: ignore[assignment]

    @property
    def info(self) -> ModelInfo:
        """Sizes, classes and image preparation, as in model.json."""
        if self._info is None:
            raise UserError("this model has no info (sizes, classes, image preparation); load it with mrl.load")
        return self._info

    @info.setter
    def info(self, info: ModelInfo) -> None:
        self._info = info

    def embed(self, images: Tensor) -> Tensor:
        """Return embeddings ``(B, D)`` as the head reads them: raw, not normalized."""
        features = self.backbone.forward_features(images)  # type: ignore[operator]
        return self.backbone.forward_head(features)  # type: ignore[operator]

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.embed(images))

    @torch.no_grad()
    def encode(self, images: Tensor, dim: int | None = None) -> Tensor:
        """Return unit-norm float32 embeddings ``(B, dim)`` for search, in eval mode and without gradients.

        Args:
            images: ``(B, 3, H, W)``, normalized as by `preprocess`, on the model's device.
            dim: Prefix size; the largest trained one when None. A size that was not trained gives a warning.

        Raises:
            UserError: ``dim`` is not between 1 and the width.
        """
        dim = self.check_dim(dim)
        self.warn_if_untrained(dim)
        was_training = self.training
        self.eval()
        try:
            return unit_prefix(self.embed(images), dim)
        finally:
            self.train(was_training)

    def check_dim(self, dim: int | None) -> int:
        """Return ``dim``, or the largest trained size for None; raise if the embedding has no such prefix."""
        return len(prefix(torch.empty(self.width), self.head.nesting_list[-1] if dim is None else dim))

    def warn_if_untrained(self, dim: int) -> None:
        """Warn if ``dim`` is a prefix size that was not trained."""
        if dim not in self.head.nesting_list:
            warnings.warn(f"{dim} dims were not trained; trained are {list(self.head.nesting_list)}", stacklevel=4)

    @property
    def preprocess(self) -> v2.Compose:
        """The evaluation transform: PIL image or uint8 tensor -> normalized ``(3, H, W)`` for `encode`.

        PIL images become RGB as files do: see `mrl.rgb`.
        """
        steps = [
            partial(_upright_rgb, exif_rotation=self.info.exif_rotation),
            v2.ToImage(),
            v2.RGB(),
            v2.Resize(self.info.resize_px, v2.InterpolationMode(self.info.interpolation), antialias=True),
            v2.CenterCrop(self.info.crop_px),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(self.info.mean, self.info.std),
        ]
        return v2.Compose(steps)

    def _save_pretrained(self, save_directory: Path) -> None:
        save_model(self, self.info, save_directory)
        if self.card:
            atomic_write_text(save_directory / "README.md", self.card)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **given: Any) -> MatryoshkaClassifier:
        if Path(model_id).is_dir():
            return load(model_id)
        # `given` also has the entries of config.json; `load` reads model.json
        where = {key: given[key] for key in ("revision", "cache_dir", "force_download", "local_files_only", "token")}
        return load(snapshot_download(model_id, allow_patterns=[*HUB_FILES], **where))

    def train(self, mode: bool = True) -> MatryoshkaClassifier:
        """Set training mode, except for frozen BatchNorms, whose statistics must not move."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
                module.train(mode and module.weight.requires_grad)
        return self


def _upright_rgb(image: Any, exif_rotation: str) -> Any:
    return to_rgb(image, exif_rotation) if isinstance(image, Image.Image) else image


def build_model(
    backbone: nn.Module,
    num_classes: int,
    nesting_list: Sequence[int] | None = None,
    tied: bool = False,
    scaled: bool = False,
) -> MatryoshkaClassifier:
    """Put a new nested head on ``backbone``; without a ``nesting_list`` the dims are halvings of its width."""
    width: int = backbone.head_hidden_size  # type: ignore[assignment]
    dims = default_nesting_list(width) if nesting_list is None else check_nesting_list(nesting_list, width)
    return MatryoshkaClassifier(backbone, NestedLinear(dims, num_classes, tied, scaled))


def build_backbone(
    name: str,
    init: str = "scratch",
    stem_stride: int = 4,
    blurpool: bool = False,
    kwargs: dict[str, Any] | None = None,
    projection: bool = False,
) -> nn.Module:
    """Return a timm backbone that gives embeddings; for the arguments see `mrl.config.ModelConfig`.

    Its classifier is the projection, or nothing.
    """
    if init == "pretrained" and blurpool:
        raise UserError("model.init pretrained: timm's weights were trained without blur; give model.blurpool false")
    backbone = _create_timm(name, init == "pretrained", kwargs or {})
    source = None if init in ("scratch", "pretrained") else Path(init)
    if source is not None and not source.exists():
        raise UserError(f"model.init {init!r} is neither scratch, pretrained, nor an existing file or run directory")
    if source is not None and source.is_file():
        _load_weights_file(backbone, source)  # published weights have the published stem: load before changing it
    set_stem_stride(backbone, stem_stride)
    if blurpool:
        add_blurpool(backbone)
    if projection:
        add_projection(backbone, kwargs or {})
    if source is not None and source.is_dir():
        changes = {"stem_stride": stem_stride, "blurpool": blurpool, "projection": projection, "kwargs": kwargs or {}}
        _load_run(backbone, source, {"backbone": name, **changes})
    return backbone


def add_projection(backbone: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Give a backbone without classifier one that maps its pooled output to as many numbers, at first a rotation."""
    pooling = [kwargs["global_pool"]] if "global_pool" in kwargs else []
    backbone.reset_classifier(backbone.head_hidden_size, *pooling)  # type: ignore[operator]
    for parameter in projection_of(backbone):
        (nn.init.orthogonal_ if parameter.ndim > 1 else nn.init.zeros_)(parameter)


def projection_of(backbone: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of the projection; none without one."""
    classifiers = backbone.get_classifier()  # type: ignore[operator]
    parts = classifiers if isinstance(classifiers, tuple) else (classifiers,)
    return [parameter for part in parts for parameter in part.parameters()]


def _create_timm(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise UserError(f"model.backbone {name!r} is not a timm model; similar names: {', '.join(close) or 'none'}")
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = ", ".join(each.partition(".")[2] for each in timm.list_pretrained(f"{name.partition('.')[0]}.*"))
        raise UserError(f"model.backbone {name!r}: timm has no such weights; tags: {tags or 'none'}") from error
    for key, setting in SET_ELSEWHERE.items():
        if key in kwargs:
            raise UserError(f"model.kwargs {key} is not allowed; it is set by {setting}")

    def create(kwargs: dict[str, Any], pretrained: bool = False) -> nn.Module:
        backbone = timm.create_model(name, pretrained=pretrained, num_classes=0, **kwargs)
        if not hasattr(backbone, "forward_head"):
            raise UserError("it gives no pooled vector per image")
        return backbone

    try:
        return create(kwargs, pretrained)
    except Exception as error:
        if kwargs and (not pretrained or not works(create, kwargs)):
            culprit = find_culprit(create, kwargs) or kwargs
            reason = str(error) or type(error).__name__
            all_out = "; --model.kwargs '{}' leaves all of them out" if len(culprit) > 1 else ""
            raise UserError(f"model.kwargs {culprit} does not fit {name}: {reason}{all_out}") from error
        if not pretrained:
            raise
        reason = " ".join(str(error).split())
        if (published := timm.get_pretrained_cfg(name)) and published.hf_hub_id:
            address = f"https://huggingface.co/{published.hf_hub_id}"
            reason += f" Offline: --model.init FILE takes a copy of model.safetensors of {address}"
        raise UserError(f"model.init pretrained: timm's weights of {name} could not be loaded: {reason}") from error


def works(attempt: Callable[..., Any], *arguments: Any) -> bool:
    """Whether ``attempt(*arguments)`` raises no error."""
    try:
        attempt(*arguments)
    except Exception:
        return False
    return True


def find_culprit(attempt: Callable[[dict[str, Any]], Any], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """Return the one of ``kwargs`` without which ``attempt(kwargs)`` raises no error; None if there is none."""
    for key, value in kwargs.items():
        if works(attempt, {other: kwargs[other] for other in kwargs if other != key}):
            return {key: value}
    return None


def _load_weights_file(backbone: nn.Module, path: Path) -> None:
    """Load timm weights strictly; only the file's own classifier may be left over."""
    try:
        state = timm.models.load_state_dict(str(path), use_ema=False)
    except Exception as error:
        raise UserError(f"model.init: {path} cannot be read as a weights file: {error}") from error
    classifier = backbone.pretrained_cfg.get("classifier") or "fc"  # type: ignore[union-attr,operator]
    own = tuple(f"{name}." for name in ([classifier] if isinstance(classifier, str) else classifier))
    expected = backbone.state_dict()
    state = {key: value for key, value in state.items() if key in expected or not key.startswith(own)}
    check_state(state, expected, f"model.init: {path} does not fit the backbone")
    backbone.load_state_dict(state)


def _load_run(backbone: nn.Module, run: Path, settings: dict[str, Any]) -> None:
    """Load the backbone of a finished run; settings that can change while all names stay must be equal to the run's."""

    def of_output(setting: Any) -> Any:  # the tag of weights, dropout, and image sizes may differ
        if isinstance(setting, dict):
            return {key: value for key, value in setting.items() if "drop" not in key and "img_size" not in key}
        return str(setting).partition(".")[0]

    info, state = read_saved(run)
    for key, value in settings.items():
        theirs = getattr(info, key)
        if of_output(theirs) != of_output(value):
            raise UserError(f"model.init: the run {run} has model.{key} {theirs}, not {value}; use the same")
    state = _part(state, "backbone.")
    check_state(state, backbone.state_dict(), f"model.init: the run {run} holds another backbone")
    backbone.load_state_dict(state)


def _part(state: Mapping[str, Tensor], start: str) -> dict[str, Tensor]:
    return {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}


def load_head(model: MatryoshkaClassifier, run: Path, classes: Sequence[str]) -> bool:
    """Load the head of a finished run and return True; return False if its classes or sizes differ."""
    info, state = read_saved(run)
    head = model.head
    theirs = (info.classes, info.nesting_list, info.tied, info.scaled)
    if theirs != (tuple(classes), head.nesting_list, head.tied, head.scaled):
        return False
    head.load_state_dict(_part(state, "head."))
    return True


def check_state(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], failure: str) -> None:
    """Check that ``state`` has exactly the names and shapes of ``expected``."""
    missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    wrong = sorted(key for key in expected.keys() & state.keys() if state[key].shape != expected[key].shape)
    for what, keys in (("lacks", missing), ("has the unknown", extra), ("has other shapes for", wrong)):
        if keys:
            raise UserError(f"{failure}: it {what} {len(keys)} entries, e.g. {keys[:3]}")


def freeze(model: MatryoshkaClassifier, trainable: str | Sequence[str]) -> None:
    """Keep gradients for head, projection and ``trainable`` only: "all", "head", or names of backbone modules."""
    if trainable == "all":
        return
    model.backbone.requires_grad_(False)
    for parameter in projection_of(model.backbone):
        parameter.requires_grad_(True)
    for name in [] if trainable == "head" else trainable:
        try:
            model.backbone.get_submodule(name).requires_grad_(True)
        except AttributeError as error:
            top = [child for child, _ in model.backbone.named_children()]
            raise UserError(f"model.trainable: the backbone has no module {name!r}; at the top are {top}") from error


def save_model(
    model: MatryoshkaClassifier, info: ModelInfo, directory: Path, frozen: dict[str, Tensor] | None = None
) -> None:
    """Write model.safetensors and model.json, which `load` reads.

    ``frozen`` holds entries that ``model`` lacks if it is only the tail of a network (see `mrl.training.frozen`).
    """
    # Copies, because safetensors refuses a parameter with two names; timm's CoaT has some.
    content = save({key: value.contiguous().clone() for key, value in ((frozen or {}) | model.state_dict()).items()})
    atomic_write(directory / "model.safetensors", lambda file: file.write(content))
    atomic_write_text(directory / "model.json", json.dumps(dataclasses.asdict(info), indent=2) + "\n")


def read_saved(directory: Path) -> tuple[ModelInfo, dict[str, Tensor]]:
    """Return the content of model.json and of model.safetensors."""
    for name in ("model.json", "model.safetensors"):
        if not (directory / name).is_file():
            raise UserError(f"{directory} has no {name}, so it is not a finished run directory")
    try:
        content = dict(json.loads((directory / "model.json").read_text()))
        if (version := content.get("format_version")) != FORMAT_VERSION:  # with other keys
            raise ValueError(f"it was saved in format {version}; this version reads format {FORMAT_VERSION}")
        lists = {key: tuple(value) for key, value in content.items() if isinstance(value, list)}
        return ModelInfo(**content | lists), load_file(directory / "model.safetensors")
    except (TypeError, ValueError, SafetensorError) as error:
        raise UserError(f"{directory} cannot be read as a saved model: {error}") from error


def load(run: str | Path) -> MatryoshkaClassifier:
    """Return the model of a finished run directory, in eval mode on the CPU, with its ``info``.

    Raises:
        UserError: As `read_saved`, or the two files do not fit each other.
    """
    info, state = read_saved(Path(run))
    backbone = build_backbone(info.backbone, "scratch", info.stem_stride, info.blurpool, info.kwargs, info.projection)
    model = build_model(backbone, len(info.classes), info.nesting_list, info.tied, info.scaled)
    check_state(state, model.state_dict(), f"{run}: model.safetensors does not fit model.json")
    model.load_state_dict(state)
    model.info = model._hub_mixin_config = info  # pushed as config.json, which the Hub's client looks for first
    card = Path(run) / "README.md"
    model.card = card.read_text(encoding="utf-8") if card.is_file() else None
    return model.eval()


class BlurConv2d(nn.Conv2d):
    """Blur the input with a fixed [1,2,1]x[1,2,1]/16, zero-padded, then convolve: FFCV's BlurPool.

    Parameters keep the plain convolution's names, so plain weights load. timm's ``resnetblur50`` blurs in other
    places and gives other values.
    """

    blur: Tensor

    def __init__(self, conv: nn.Conv2d):
        shape = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation)
        super().__init__(*shape, conv.groups, conv.bias is not None)  # type: ignore[arg-type]
        self.weight, self.bias = conv.weight, conv.bias
        line = torch.tensor([1.0, 2.0, 1.0]) / 4
        kernel = torch.outer(line, line).expand(conv.in_channels, 1, 3, 3).clone()
        self.register_buffer("blur", kernel, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(F.conv2d(images, self.blur.to(images.dtype), padding=1, groups=self.in_channels))


def add_blurpool(backbone: nn.Module) -> None:
    """Blur before each convolution of stride > 1 and at least 16 input channels."""
    found = {
        name: module
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Conv2d) and max(module.stride) > 1 and module.in_channels >= 16
    }
    if not found:
        raise UserError("model.blurpool is true, but the backbone has no strided convolution to blur; set it to false")
    special = sorted({type(conv).__name__ for conv in found.values() if type(conv) is not nn.Conv2d})
    if special:  # what they do to weights or borders would be lost, under the same parameter names
        raise UserError(
            f"model.blurpool is true, but the backbone's strided convolutions are {', '.join(special)}; only plain "
            "Conv2d can be blurred; set it to false"
        )
    for name, conv in found.items():
        backbone.set_submodule(name, BlurConv2d(conv))


def set_stem_stride(backbone: nn.Module, stem_stride: int) -> None:
    """Let a ResNet's stem keep more of a small image: 2 removes the max-pool, 1 also the first convolution's stride.

    A plain 7x7 first convolution becomes a new 3x3 one; the 3x3 of a deep stem keeps its weights.
    """
    if stem_stride == 4:
        return
    if not isinstance(backbone, timm.models.ResNet):
        raise UserError(
            f"model.stem_stride {stem_stride} is for timm ResNets; "
            "give other backbones their own arguments, e.g. model.kwargs {img_size: 64, patch_size: 8} for a ViT"
        )
    backbone.set_submodule("maxpool", nn.Identity())
    if stem_stride == 1 and isinstance(backbone.conv1, nn.Conv2d):
        conv = nn.Conv2d(3, backbone.conv1.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        backbone.set_submodule("conv1", conv)
    elif stem_stride == 1:
        backbone.get_submodule("conv1.0").stride = (1, 1)  # type: ignore[assignment]
