"""A timm backbone with a nested head: building, freezing, saving and loading it."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torchvision.transforms import v2

from mrl.backbones import build_backbone
from mrl.errors import UserError
from mrl.files import write_text, write_whole
from mrl.heads import NestedLinear
from mrl.nesting import check_nesting_list, default_nesting_list, unit_prefix

FORMAT_VERSION = 1


@dataclass(frozen=True)
class ModelInfo:
    """All a stranger needs to rebuild a model and feed it, beside its weights: the content of model.json."""

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
    format_version: int = FORMAT_VERSION


class MatryoshkaClassifier(nn.Module):
    """Logits ``(G, B, C)`` of images ``(B, 3, H, W)``: a backbone's pooled output, read by a nested head."""

    info: ModelInfo | None = None

    def __init__(self, backbone: nn.Module, head: NestedLinear):
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.width: int = backbone.head_hidden_size  # type: ignore[assignment]

    def embed(self, images: Tensor) -> Tensor:
        """Embeddings ``(B, D)`` as the head reads them: raw, not normalised."""
        features = self.backbone.forward_features(images)  # type: ignore[operator]
        return self.backbone.forward_head(features, pre_logits=True)  # type: ignore[operator]

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.embed(images))

    @torch.no_grad()
    def encode(self, images: Tensor, dim: int | None = None) -> Tensor:
        """Unit embeddings ``(B, dim)`` in float32 for search and similarity, in eval mode, without gradients.

        Args:
            images: ``(B, 3, H, W)``, normalised as `preprocess` does, on the model's device.
            dim: Prefix size, 1 to the width; the full width when None. A size that was not trained is
                allowed, with a warning.

        Raises:
            UserError: ``dim`` is not between 1 and the width.
        """
        dim = self.width if dim is None else dim
        if dim <= self.width and dim not in self.head.nesting_list:
            warnings.warn(f"{dim} dims were not trained; trained are {list(self.head.nesting_list)}", stacklevel=3)
        was_training = self.training
        self.eval()
        try:
            return unit_prefix(self.embed(images), dim)
        finally:
            self.train(was_training)

    @property
    def preprocess(self) -> v2.Compose:
        """The transform of evaluation: PIL image or uint8 tensor -> normalised ``(3, H, W)`` for `encode`."""
        if self.info is None:
            raise UserError("this model was not saved with its image size and normalisation; load it with mrl.load")
        return v2.Compose(
            [
                v2.ToImage(),
                v2.RGB(),
                v2.Resize(self.info.resize_px, antialias=True),
                v2.CenterCrop(self.info.crop_px),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(self.info.mean, self.info.std),
            ]
        )

    def train(self, mode: bool = True) -> MatryoshkaClassifier:
        """Itself in training mode, but for frozen BatchNorms, whose statistics must not move."""
        super().train(mode)
        for module in self.modules():
            if (
                isinstance(module, nn.modules.batchnorm._BatchNorm)
                and module.affine
                and not module.weight.requires_grad
            ):
                module.eval()
        return self


def build_model(
    backbone: nn.Module, num_classes: int, nesting_list: Sequence[int] | None = None, tied: bool = False
) -> MatryoshkaClassifier:
    """``backbone`` with a new nested head; sizes halve down from its width when ``nesting_list`` is None.

    Raises:
        UserError: The nesting list does not fit the backbone's width.
    """
    width: int = backbone.head_hidden_size  # type: ignore[assignment]
    dims = default_nesting_list(width) if nesting_list is None else check_nesting_list(nesting_list, width)
    return MatryoshkaClassifier(backbone, NestedLinear(dims, num_classes, tied))


def freeze(model: MatryoshkaClassifier, trainable: str | Sequence[str]) -> None:
    """Leave gradients to the head and ``trainable`` only: "all", "head", or names of backbone modules.

    A BatchNorm's statistics move if its own weights train: beside a trainable ``layer4.2.conv3`` the frozen
    ``layer4.2.bn3`` keeps those that it was trained with.

    Raises:
        UserError: The backbone has no module of such a name.
    """
    if trainable == "all":
        return
    model.backbone.requires_grad_(False)
    for name in [] if trainable == "head" else trainable:
        try:
            model.backbone.get_submodule(name).requires_grad_(True)
        except AttributeError as error:
            top = [child for child, _ in model.backbone.named_children()]
            raise UserError(f"model.trainable: the backbone has no module {name!r}; at its top are {top}") from error


def save_model(model: MatryoshkaClassifier, info: ModelInfo, directory: Path) -> None:
    """Write model.safetensors and model.json, which `load` reads.

    Raises:
        UserError: They cannot be written, e.g. because the disk is full; what stood there is kept.
    """
    content = save({key: value.contiguous() for key, value in model.state_dict().items()})
    write_whole(directory / "model.safetensors", lambda file: file.write(content))
    write_text(directory / "model.json", json.dumps(dataclasses.asdict(info), indent=2) + "\n")


def load(run: str | Path) -> MatryoshkaClassifier:
    """The model of a finished run directory, in eval mode on the CPU, its ``info`` filled.

    Raises:
        UserError: The directory lacks model.json or model.safetensors, or they do not fit each other.
    """
    directory = Path(run)
    for name in ("model.json", "model.safetensors"):
        if not (directory / name).is_file():
            raise UserError(f"{directory} has no {name}, so it is not a finished run directory")
    try:
        read = dict(json.loads((directory / "model.json").read_text()))
        content: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in read.items()
        }
        version = content.get("format_version")
        # Before anything else, because another format has other keys.
        info = ModelInfo(**content) if version == FORMAT_VERSION else None
        state = load_file(directory / "model.safetensors")
    except (TypeError, ValueError, SafetensorError) as error:
        raise UserError(f"{directory} cannot be read as a saved model: {error}") from error
    if info is None:
        raise UserError(f"{directory} was saved in format {version}; this version reads format {FORMAT_VERSION}")
    backbone = build_backbone(info.backbone, "scratch", info.stem_stride, info.blurpool, info.kwargs)
    model = build_model(backbone, len(info.classes), info.nesting_list, info.tied)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{directory}: model.safetensors does not fit model.json; {error}") from error
    model.info = info
    return model.eval()
