"""The frozen part of a network, computed once (``train.cache_views``).

Where ``model.trainable`` leaves the first layers of the backbone frozen, their output for an image and a crop never
changes. `split_frozen` cuts a model into a frozen trunk and a trainable tail. `TrunkCache` stores the trunk's outputs
on disk, one view (the crops and flips of one epoch) after the other, and training runs the tail alone::

    run.dir/trunk_cache/train_view0_<hash of weights, images, and crops>/vectors.npy
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from mrl import distributed
from mrl.config import Config
from mrl.data.images import EvalImages, Images
from mrl.distributed import Process
from mrl.engine import FastForward, good_batch_size
from mrl.errors import UserError
from mrl.model import MatryoshkaClassifier
from mrl.retrieval.embeddings import EmbeddingMetadata, alone_in, embed_split

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Trunk(nn.Module):
    """Map images ``(B, 3, H, W)`` to what the first trainable layer reads, flattened: ``(B, ...) -> (B, F)``."""

    def __init__(self, backbone: nn.Module, whole: bool):
        super().__init__()
        self.backbone, self.whole = backbone, whole

    def outputs(self, images: Tensor) -> Tensor:
        """Return what the tail reads."""
        features = self.backbone.forward_features(images)  # type: ignore[operator]
        return self.backbone.forward_head(features) if self.whole else features  # type: ignore[operator]

    def forward(self, images: Tensor) -> Tensor:
        out = self.outputs(images)
        # Channels last, so that a stored batch needs no copy to be in that memory format again.
        return (out.permute(0, 2, 3, 1) if out.ndim == 4 else out).flatten(1)


class _Pooled(nn.Sequential):
    """The tail of a backbone of which at most the projection is trained: pooled vectors in, embeddings out."""

    def __init__(self, width: int, projection: Mapping[str, nn.Module]):
        super().__init__(OrderedDict(projection))
        self.head_hidden_size = width

    def forward_features(self, pooled: Tensor) -> Tensor:
        return pooled

    def forward_head(self, pooled: Tensor) -> Tensor:
        return self(pooled)


def split_frozen(model: MatryoshkaClassifier, px: int) -> tuple[Trunk, MatryoshkaClassifier]:
    """Cut a frozen ``model`` before its first trainable layer, so that ``tail(trunk.outputs(x)) == model(x)``.

    Trunk and tail share their parameters with ``model``: training the tail trains the model. The cut is checked with
    images of ``px`` pixels.
    """
    backbone = model.backbone
    layers = _layers(backbone)
    gradients = {name: [p.requires_grad for p in backbone.get_submodule(name).parameters()] for name in layers}
    trainable = [name for name in layers if any(gradients[name])]
    cut = layers.index(trainable[0]) if trainable else len(layers)
    if not any(gradients[name] for name in layers[:cut]):
        raise UserError("train.cache_views needs frozen layers before the trainable ones; see model.trainable")
    behind = [name for name in layers[cut:] if gradients[name] and not all(gradients[name])]
    if behind:
        raise UserError(
            f"train.cache_views: {', '.join(behind)} of the backbone is frozen after the trainable {trainable[0]}; "
            f"give --model.trainable '[{', '.join(dict.fromkeys([*trainable, *behind]))}]'"
        )
    projection = {name: layer for name, layer in backbone.named_children() if layer is backbone.get_classifier()}  # type: ignore[operator]
    if not set(trainable) <= set(projection):
        trunk = Trunk(_without(backbone, layers[cut:]), whole=False)
        tail = MatryoshkaClassifier(_without(backbone, layers[:cut]), model.head)
        for name, _ in list(tail.backbone.named_parameters(recurse=False)):
            setattr(tail.backbone, name, None)  # the class token and position embedding of a ViT
    else:
        trunk = Trunk(_without(backbone, trainable), whole=True)
        projection = {name: projection[name] for name in trainable}
        tail = MatryoshkaClassifier(_Pooled(model.width, projection), model.head)
    device, training = next(model.parameters()).device, model.training
    images = torch.randn(2, 3, px, px, device=device, generator=torch.Generator(device).manual_seed(0))
    for part in (model, trunk, tail):
        part.eval()
    try:
        with torch.no_grad():
            if not torch.allclose(tail.embed(trunk.outputs(images)), model.embed(images), atol=1e-4, rtol=1e-3):
                raise RuntimeError("the parts give another embedding")
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(
            "train.cache_views: the layers of this backbone do not run one after the other "
            f"({str(error).splitlines()[0]}); give 0"
        ) from error
    model.train(training)
    tail.train(training)
    return trunk.eval(), tail


def _layers(backbone: nn.Module, prefix: str = "") -> list[str]:
    """Return the names of the layers in their order; each child of a Sequential is a layer of its own."""
    found: list[str] = []
    for name, child in backbone.named_children():
        whole = not isinstance(child, nn.Sequential) or len(child) == 0
        found += [prefix + name] if whole else _layers(child, f"{prefix}{name}.")
    return found


def _without(backbone: nn.Module, names: Sequence[str]) -> nn.Module:
    """Return a copy of ``backbone``, sharing its tensors, in which the layers ``names`` do nothing."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*backbone.parameters(), *backbone.buffers())}
    part = copy.deepcopy(backbone, shared)
    for name in names:
        part.set_submodule(name, nn.Identity())
    return part


class TrunkCache:
    """A model cut into its frozen trunk, whose outputs are stored, and its trainable ``tail``.

    Args:
        model: Frozen by `mrl.model.freeze`, on the device of ``process``.
        directory: Where outputs are stored, for all runs with the same frozen layers.
        precision: fp32, bf16 or fp16: of the stored numbers.
    """

    def __init__(self, model: MatryoshkaClassifier, config: Config, directory: Path, precision: str, process: Process):
        self.trunk, self.tail = split_frozen(model, config.data.eval_px)
        self.num_views, self.directory, self.process = config.train.cache_views, directory, process
        self.engines: dict[int, FastForward] = {}  # by the side of the images in pixels
        layers = config.model  # of which the weights do not tell everything
        about = [layers.backbone, layers.kwargs, layers.stem_stride, layers.blurpool]
        digest = hashlib.sha256(json.dumps(about).encode())
        for name, tensor in sorted(self.trunk.state_dict().items()):
            digest.update(name.encode() + tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        self.metadata = EmbeddingMetadata(
            checkpoint_sha256=digest.hexdigest(),
            dataset=config.data.name,
            split="",
            resize_px=config.data.eval_resize_px,
            crop_px=config.data.eval_px,
            normalization=f"mean {config.data.mean}, std {config.data.std}",
            interpolation=config.data.interpolation,
            flip=False,
            classes_sha256="",
            precision=precision,
        )

    def shape(self, px: int) -> tuple[int, ...]:
        """Return the shape of what the tail reads of one image."""
        with torch.inference_mode():
            return tuple(self.trunk.outputs(torch.zeros(1, 3, px, px, device=self.process.device)).shape[1:])


class CachedImages:
    """A split as a trunk's outputs, which the tail reads in place of images.

    They are computed when they are first asked for. Epoch e reads the crops and flips of epoch ``e % num_views``.
    ``split`` is train, val, or the name of other images.
    """

    def __init__(self, cache: TrunkCache, split: str, images: Images):
        self.labels = images.labels
        self._cache, self._images = cache, images
        digest = images.sha256()
        if not distributed.agree(int(digest[:14], 16)):
            raise UserError(
                "data.root does not hold the same files, of the same times, on all machines, which train.cache_views "
                "needs; share the folder, or copy it with the times (rsync -a)"
            )
        self._metadata = dataclasses.replace(cache.metadata, split=split, classes_sha256=digest)
        self._outputs: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def train_batches(self, indices: Sequence[np.ndarray], epoch: int, px: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the outputs for a batch of random crops for each array of indices."""
        return self._batches(self.view(epoch, px), px, indices)

    def eval_batches(self, indices: Sequence[np.ndarray], flip: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the outputs for a batch of center crops for each array of indices; ``flip`` mirrors all of them."""
        return self._batches(self.center(flip), self._images.transform.eval_px, indices)

    def view(self, epoch: int, px: int) -> np.ndarray:
        """Return the stored outputs for the random crops of an epoch ``(N, F)``, computed if need be."""
        view = epoch % self._cache.num_views
        crops = dataclasses.asdict(self._images.transform)
        return self._stored(f"_view{view}", _View(self._images, self.labels, view, px), px, crops)

    def center(self, flip: bool = False) -> np.ndarray:
        """Return the stored outputs for the center crops ``(N, F)``, computed if need be."""
        return self._stored("_flip" if flip else "", self._images, self._images.transform.eval_px, {}, flip)

    def _stored(self, view: str, images: EvalImages, px: int, crops: dict[str, Any], flip: bool = False) -> np.ndarray:
        if view in self._outputs:
            return self._outputs[view]
        cache, process = self._cache, self._cache.process
        metadata = dataclasses.replace(self._metadata, flip=flip)
        key = hashlib.sha256(json.dumps([dataclasses.asdict(metadata), px, crops]).encode()).hexdigest()
        directory = cache.directory / f"{metadata.split}{view}_{key[:12]}"
        width, dtype = math.prod(cache.shape(px)), DTYPES[metadata.precision]
        size = width * dtype.itemsize * len(self) / 2**30

        def report(engine: str) -> None:
            if process.is_main:
                tqdm.write(
                    f"computing the frozen layers once, with {engine}: {directory}, {size:.2f} GiB for each view"
                )

        forward = cache.engines.setdefault(px, FastForward(cache.trunk, len(self) * max(1, cache.num_views), report))
        with alone_in(directory, process):  # runs that start together wait for the one that computes
            batch_size = good_batch_size(process.device)
            found = embed_split(directory, metadata, images, forward, width, process, batch_size, dtype)
        self._outputs[view] = found.vectors
        return found.vectors

    def _batches(self, outputs: np.ndarray, px: int, indices: Sequence[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        shape, device = self._cache.shape(px), self._cache.process.device
        for batch in indices:
            out = torch.from_numpy(outputs[batch]).view(DTYPES[self._metadata.precision]).to(device).float()
            if len(shape) == 3:
                out = out.view(-1, *shape[1:], shape[0]).permute(0, 3, 1, 2)
            yield out.view(-1, *shape), self.labels[torch.from_numpy(np.asarray(batch))].to(device)


@dataclasses.dataclass
class _View:
    """The random crops of one epoch, in the order of `embed_split`."""

    images: Images
    labels: Tensor
    epoch: int
    px: int

    def __len__(self) -> int:
        return len(self.images)

    def eval_batches(self, indices: Sequence[np.ndarray], flip: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        return self.images.train_batches(indices, self.epoch, self.px)
