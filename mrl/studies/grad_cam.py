"""Where in an image the classifier of each prefix looks: Grad-CAM (Selvaraju et al., 2017), by the package grad-cam."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mrl.errors import UserError
from mrl.models import MatryoshkaClassifier
from mrl.nesting import prefix
from mrl.studies.logits import Classifier

SMALLEST_MAP = 4


def grad_cams(
    model: MatryoshkaClassifier,
    images: Tensor,
    classifiers: Sequence[Classifier],
    targets: np.ndarray,
    layer: str | None = None,
) -> np.ndarray:
    """Heat ``(G, B, H, W)``, 0 to 1 within each image: what speaks for the target class, at each size.

    The score that is differentiated is the logit of each prefix's own classifier, so the maps of one image
    differ in nothing but the size.

    Args:
        model: In eval mode.
        images: ``(B, 3, H, W)``, normalised, on the model's device.
        classifiers: Weight ``(C, dim)`` and bias ``(C,)`` of G sizes.
        targets: ``(G, B)`` int64: the class that is asked about, e.g. the predicted one.
        layer: Module of the backbone whose output is weighed; `default_layer` when None.

    Raises:
        UserError: grad-cam is not installed, or the backbone has no such layer.
    """
    try:
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    except ImportError as error:
        raise UserError("Grad-CAM needs the package grad-cam: pip install grad-cam") from error
    name = default_layer(model, images.shape[-1]) if layer is None else layer
    try:
        module = model.backbone.get_submodule(name)
    except AttributeError as error:
        raise UserError(f"the backbone has no layer {name!r}; those with maps are {list(_stages(model))}") from error
    to_maps = _MapsFirst(_stages(model).get(name), getattr(model.backbone, "num_prefix_tokens", 0))
    maps = []
    for classifier, of_size in zip(classifiers, targets, strict=True):
        with GradCAM(_OneSize(model, classifier), [module], reshape_transform=to_maps) as cam:
            maps.append(cam(images, [ClassifierOutputTarget(int(target)) for target in of_size]))
    return np.stack(maps)


def default_layer(model: MatryoshkaClassifier, px: int) -> str:
    """The last stage of the backbone whose maps are at least 4 x 4 for images of ``px`` pixels.

    Small images leave the very last stage a single cell, which can show nothing.

    Raises:
        UserError: timm does not say where the backbone's stages are, or none has maps as large.
    """
    weight = next(model.parameters())
    sides: dict[str, float] = {}
    hooks = [
        model.backbone.get_submodule(name).register_forward_hook(
            lambda _, __, output, name=name, channels=channels: sides.update({name: _side(output, channels)})
        )
        for name, channels in _stages(model).items()
    ]
    with torch.no_grad():
        model.embed(torch.zeros(1, 3, px, px, device=weight.device, dtype=weight.dtype))
    for hook in hooks:
        hook.remove()
    large = [name for name, side in sides.items() if side >= SMALLEST_MAP]
    if not large:
        raise UserError(
            f"no stage of this backbone has maps of {SMALLEST_MAP} x {SMALLEST_MAP} or more for images of {px} px "
            f"({sides}); name a layer"
        )
    return large[-1]


class _OneSize(nn.Module):
    """Logits ``(B, C)`` of one prefix, down to the images."""

    def __init__(self, model: MatryoshkaClassifier, classifier: Classifier):
        super().__init__()
        self.model = model
        self.weight, self.bias = (part.detach() for part in classifier)

    def forward(self, images: Tensor) -> Tensor:
        return F.linear(prefix(self.model.embed(images), self.weight.shape[1]), self.weight, self.bias)


class _MapsFirst:
    """A layer's output as ``(B, channels, height, width)``, from timm's other two shapes of it too."""

    def __init__(self, channels: int | None, num_prefix_tokens: int):
        self.channels = channels
        self.num_prefix_tokens = num_prefix_tokens

    def __call__(self, output: Tensor) -> Tensor:
        if output.ndim == 3:  # tokens of a transformer, in rows, after class and register tokens
            output = output[:, self.num_prefix_tokens :]
            side = math.isqrt(output.shape[1])
            return output.unflatten(1, (side, -1)).permute(0, 3, 1, 2)
        if output.shape[1] != self.channels and output.shape[-1] == self.channels:
            return output.permute(0, 3, 1, 2)
        return output


def _stages(model: MatryoshkaClassifier) -> dict[str, int]:
    """``{module: channels}`` of the backbone's stages, in order, as timm lists them."""
    info: Any = getattr(model.backbone, "feature_info", None)
    if not info:
        raise UserError("timm does not list the stages of this backbone, so Grad-CAM has no layer to look at")
    return {stage["module"]: stage["num_chs"] for stage in info}


def _side(output: Tensor, channels: int) -> float:
    """Side of the map in a layer's output, in cells; the shorter one of a map that is not square."""
    if output.ndim == 3:
        return math.sqrt(output.shape[1])
    return min(output.shape[2:] if output.shape[1] == channels else output.shape[1:3])
