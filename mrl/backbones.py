"""timm backbones: their creation, weights, and two changes that the paper's recipes need (blur, small stem)."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mrl.errors import UserError


class BlurConv2d(nn.Conv2d):
    """A convolution that first blurs its input with [1,2,1]x[1,2,1]/16, zero-padded, as FFCV's BlurPool does.

    Its parameters have the plain convolution's names, so plain weights load into it. timm's
    ``resnetblur50`` blurs in other places and is another function.
    """

    blur: Tensor

    def __init__(self, conv: nn.Conv2d):
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            conv.groups,
            conv.bias is not None,
        )
        self.weight, self.bias = conv.weight, conv.bias
        line = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer(
            "blur", torch.outer(line, line).expand(conv.in_channels, 1, 3, 3).clone(), persistent=False
        )

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(F.conv2d(images, self.blur.to(images.dtype), padding=1, groups=self.in_channels))


def add_blurpool(backbone: nn.Module) -> int:
    """How many convolutions were given a blur: those of stride > 1 and at least 16 input channels.

    Raises:
        UserError: There is none, as in a ViT, or one is more than a plain convolution.
    """
    found = [
        (parent, name, child)
        for parent in backbone.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Conv2d) and max(child.stride) > 1 and child.in_channels >= 16
    ]
    if not found:
        raise UserError("model.blurpool is true, but the backbone has no strided convolution to blur; set it to false")
    special = sorted({type(child).__name__ for _, _, child in found if type(child) is not nn.Conv2d})
    if special:  # what they do to their weights or borders would be lost, under the same parameter names
        raise UserError(
            f"model.blurpool is true, but the backbone's strided convolutions are {', '.join(special)}, and only plain "
            "Conv2d can be blurred; set it to false"
        )
    for parent, name, child in found:
        setattr(parent, name, BlurConv2d(child))
    return len(found)


def set_stem_stride(backbone: nn.Module, stem_stride: int) -> None:
    """Shrink the image less in a ResNet's stem: 2 removes the max-pool, 1 makes its first convolution unstrided too.

    A plain 7x7 first convolution becomes a new 3x3 one; the 3x3 of a deep stem keeps its weights.

    Raises:
        UserError: The backbone is not a timm ResNet.
    """
    if stem_stride == 4:
        return
    if not isinstance(backbone, timm.models.ResNet):
        raise UserError(
            f"model.stem_stride {stem_stride} is for timm ResNets; "
            "give other backbones their own arguments, e.g. model.kwargs {img_size: 64, patch_size: 8} for a ViT"
        )
    backbone.set_submodule("maxpool", nn.Identity())
    if stem_stride == 2:
        return
    stem = backbone.conv1
    if isinstance(stem, nn.Conv2d):
        conv = nn.Conv2d(3, stem.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        backbone.set_submodule("conv1", conv)
    else:
        backbone.get_submodule("conv1.0").stride = (1, 1)  # type: ignore[assignment]


def _create_timm(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise UserError(f"model.backbone {name!r} is not a timm model; similar names: {', '.join(close) or 'none'}")
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **kwargs)
    except TypeError as error:
        raise UserError(f"model.kwargs {kwargs} do not fit {name}: {error}") from error
    except Exception as error:
        if not pretrained:
            raise
        raise UserError(
            f"model.init is 'pretrained', but timm's weights of {name} could not be had: {error}"
        ) from error


def _load_weights_file(backbone: nn.Module, path: Path) -> None:
    """Load timm weights from a file; only the file's own classifier may be left over, nothing may be missing."""
    try:
        state = timm.models.load_state_dict(str(path), use_ema=False)
    except Exception as error:
        raise UserError(f"model.init: {path} cannot be read as a weights file: {error}") from error
    classifier = backbone.pretrained_cfg.get("classifier") or "fc"  # type: ignore[union-attr,operator]
    own = tuple(f"{name}." for name in ([classifier] if isinstance(classifier, str) else classifier))
    expected = backbone.state_dict()
    state = {key: value for key, value in state.items() if key in expected or not key.startswith(own)}
    check_fits(state, expected, f"model.init: {path} does not fit the backbone")
    backbone.load_state_dict(state)


def check_fits(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], failure: str) -> None:
    """Nothing, if ``state`` has the names and shapes of ``expected``, all of them and no others.

    Raises:
        UserError: It has not; the message begins with ``failure``.
    """
    missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    wrong = sorted(key for key in expected.keys() & state.keys() if state[key].shape != expected[key].shape)
    for what, keys in (("lacks", missing), ("has the unknown", extra), ("has other shapes for", wrong)):
        if keys:
            raise UserError(f"{failure}: it {what} {len(keys)} entries, e.g. {keys[:3]}")


def _load_run(backbone: nn.Module, run: Path, changes: dict[str, Any]) -> None:
    path = run / "model.safetensors"
    for file in (path, run / "model.json"):
        if not file.exists():
            raise UserError(f"model.init: {run} holds no {file.name}, so it is not a finished run directory")
    try:
        theirs, weights = json.loads((run / "model.json").read_text()), load_file(path)
    except (ValueError, SafetensorError) as error:
        raise UserError(f"model.init: {run} cannot be read as a saved model: {error}") from error
    for key, value in changes.items():
        if theirs.get(key) != value:  # their parameters have the same names, and would compute something else
            raise UserError(f"model.init: the run {run} has model.{key} {theirs.get(key)}, not {value}; give the same")
    marker = "backbone."
    state = {key[len(marker) :]: value for key, value in weights.items() if key.startswith(marker)}
    try:
        backbone.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"model.init: the run {run} holds another backbone; {error}") from error


def build_backbone(
    name: str,
    init: str = "scratch",
    stem_stride: int = 4,
    blurpool: bool = False,
    kwargs: dict[str, Any] | None = None,
) -> nn.Module:
    """A timm backbone without classifier; for the arguments see `mrl.config.ModelConfig`.

    Raises:
        UserError: An unknown name, arguments that do not fit it, or weights that do not.
    """
    if init == "pretrained" and blurpool:
        raise UserError(
            "model.init is 'pretrained', but timm's weights were trained without the blur of model.blurpool, with "
            "which they compute something else; give model.blurpool false"
        )
    backbone = _create_timm(name, init == "pretrained", kwargs or {})
    source = None if init in ("scratch", "pretrained") else Path(init)
    if source is not None and not source.exists():
        raise UserError(f"model.init {init!r} is neither scratch, pretrained, nor an existing file or run directory")
    if source is not None and source.is_file():
        _load_weights_file(backbone, source)  # published weights know the published stem: before any change to it
    set_stem_stride(backbone, stem_stride)
    if blurpool:
        add_blurpool(backbone)
    if source is not None and source.is_dir():
        _load_run(backbone, source, {"stem_stride": stem_stride, "blurpool": blurpool})
    return backbone
