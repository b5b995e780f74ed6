"""A finished and evaluated run, opened for looking at it: what the notebooks start from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mrl.config import Config, read_config
from mrl.data import build_data
from mrl.errors import UserError
from mrl.matryoshka import NestedLinear, default_nesting_list
from mrl.model import MatryoshkaClassifier, load
from mrl.results import Source, method_name
from mrl.retrieval.embeddings import EmbeddingMetadata, EmbeddingSet, embeddings_path, file_sha256, open_embeddings
from mrl.studies.classification import Classifier, truncations


@dataclass(frozen=True)
class EmbeddedRun:
    """All that the studies need of a run: no images, no backbone.

    Attributes:
        source: What its rows share.
        head: Its classifier.
        classes: Names of the classes.
        train: Embeddings of the training images, the database of retrieval.
        val: Embeddings of the validation images.
        val_flip: Those of the mirrored validation images, where the run was trained with mirrored images.
        further: Those of other images; see `mrl.studies.transfer`.
    """

    source: Source
    head: NestedLinear
    classes: tuple[str, ...]
    train: EmbeddingSet
    val: EmbeddingSet
    val_flip: EmbeddingSet | None
    further: Mapping[str, EmbeddingSet] = field(default_factory=dict)


@dataclass(frozen=True)
class OpenedRun:
    """A run's model, its embeddings and, once asked for, its images.

    A fixed-feature run is looked at as what its truncation gives: sizes that halve down from its own.

    Attributes:
        directory: The run directory.
        config: Its settings.
        model: In eval mode, on the CPU.
        source: What rows of it share.
        train: Embeddings of the training images, the database of retrieval.
        val: Embeddings of the validation images.
    """

    directory: Path
    config: Config
    model: MatryoshkaClassifier
    source: Source
    train: EmbeddingSet
    val: EmbeddingSet
    _images: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.model.info.classes  # type: ignore[union-attr]

    @property
    def dims(self) -> tuple[int, ...]:
        """Sizes to look at: the nesting list, or the halvings of the one size that a fixed-feature run has."""
        trained = self.model.head.nesting_list
        return trained if len(trained) > 1 else default_nesting_list(trained[0])

    @property
    def method(self) -> str:
        """What the rows of these `dims` are called."""
        trained = self.model.head.nesting_list
        return method_name(trained, self.model.head.tied) if len(trained) > 1 else "FF truncated"

    @cached_property
    def classifiers(self) -> list[Classifier]:
        """Weight ``(C, dim)`` and bias ``(C,)`` of each of `dims`."""
        head = self.model.head
        if len(head.nesting_list) == 1:
            return truncations(*head.weight_and_bias(0), self.dims)
        return [head.weight_and_bias(g) for g in range(len(head.nesting_list))]

    def images(self, split: str, rows: np.ndarray) -> Tensor:
        """Images ``(B, 3, H, W)`` of a split ("train" or "val") as the model reads them: cut and normalized."""
        if split not in self._images:
            self._images.update(build_data(self.config.data, 0, torch.device("cpu"), False, splits=(split,)))
        [(images, _)] = self._images[split].eval_batches([np.asarray(rows)])
        return images

    def pictures(self, split: str, rows: np.ndarray) -> np.ndarray:
        """The same images to look at: ``(B, H, W, 3)``, 0 to 1."""
        data = self.config.data
        mean, std = (torch.tensor(value)[:, None, None] for value in (data.mean, data.std))
        return (self.images(split, rows) * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()

    def __str__(self) -> str:
        return (
            f"{self.source.run}: {self.method} of {self.config.model.backbone} on {self.source.dataset}, "
            f"sizes {', '.join(map(str, self.dims))}; {len(self.train.labels):,} training and "
            f"{len(self.val.labels):,} validation images of {len(self.classes):,} classes"
        )


def open_run(run: str | Path) -> OpenedRun:
    """The run in directory ``run``, which train.py has finished and eval.py has embedded the images of.

    Raises:
        UserError: It is not a finished run, or has no embeddings of its model; the message says what to run.
    """
    directory = Path(run)
    config, model = read_config(directory / "config.yaml"), load(directory)
    sha256 = file_sha256(directory / "model.safetensors")
    sets = {split: _open(embeddings_path(directory, split), sha256) for split in ("train", "val")}
    missing = [split for split, found in sets.items() if found is None]
    if missing:
        raise UserError(
            f"{directory} has no embeddings of its {' and '.join(missing)} images by its present model; "
            f"run: python eval.py --runs {directory}"
        )
    train, val = sets["train"], sets["val"]
    assert train is not None and val is not None
    name, seen = directory.resolve().name, val.metadata
    source = Source(seen.dataset, name, config.run.seed, seen.resize_px, seen.crop_px, flip=False)
    return OpenedRun(directory, config, model, source, train, val)


def _open(directory: Path, checkpoint_sha256: str) -> EmbeddingSet | None:
    """The finished embeddings in ``directory``, or None if they are not there or of another model."""
    try:
        found = EmbeddingMetadata(**json.loads((directory / "metadata.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return open_embeddings(directory, dataclasses.replace(found, checkpoint_sha256=checkpoint_sha256))
