"""Linear classification at every prefix size (paper, section 4.2, table 1), from embeddings and the head alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mrl.matryoshka import prefix
from mrl.results import Row, Source

STUDY = "classification"
BATCH_SIZE = 2048
# Weight (C, dim), applied to the first dim coordinates of an embedding, and bias (C,).
Classifier = tuple[Tensor, Tensor]


class Predictions(NamedTuple):
    """Predictions of G classifiers for N images."""

    classes: np.ndarray  # (G, N) int64, the class of the highest logit; of equal logits, the lowest class
    confidence: np.ndarray  # (G, N) float32, the softmax of that class


def truncations(weight: Tensor, bias: Tensor, dims: Sequence[int]) -> list[Classifier]:
    """Return one classifier per size: the first ``dim`` columns of ``weight`` ``(C, D)`` and all of ``bias`` ``(C,)``.

    Applied to a fixed-feature model, this is truncation without nested training.
    """
    return [(prefix(weight, dim), bias) for dim in dims]


def classification(
    vectors: np.ndarray,
    labels: np.ndarray,
    classifiers: Sequence[Classifier],
    source: Source,
    method: str,
    *,
    device: torch.device | str = "cpu",
) -> list[Row]:
    """Return rows of top-1 and top-5 accuracy of each classifier on raw embeddings; no top-5 for 5 classes or fewer.

    Of equal logits, that of the lower class comes first.
    """
    ranks_wanted = {"top_1": 1, "top_5": 5} if len(classifiers[0][1]) > 5 else {"top_1": 1}
    ranks = []  # classes ahead of the label, (G, B) each
    for logits, truth in zip(logit_batches(vectors, classifiers, device=device), _split(labels, device), strict=True):
        own = logits.gather(2, truth[:, None].expand(len(logits), -1, 1))
        is_lower = torch.arange(logits.shape[2], device=logits.device) < truth[:, None]
        ranks.append(((logits > own) | ((logits == own) & is_lower)).sum(dim=2))
    return [
        source.row(STUDY, method, metric, int((of_size < k).sum()) / len(vectors), len(vectors), dim=weight.shape[1])
        for (weight, _), of_size in zip(classifiers, torch.cat(ranks, dim=1), strict=True)
        for metric, k in ranks_wanted.items()
    ]


def predict(
    vectors: np.ndarray,
    classifiers: Sequence[Classifier],
    mirrored: np.ndarray | None = None,
    *,
    device: torch.device | str = "cpu",
) -> Predictions:
    """Return the predicted class of every image at every size and its confidence; arguments as in `logit_batches`."""
    batches = logit_batches(vectors, classifiers, mirrored, device=device)
    found = [(*logits.max(dim=2), logits.logsumexp(dim=2)) for logits in batches]
    best, classes, total = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    return Predictions(classes.cpu().numpy(), (best - total).exp().clamp(max=1).cpu().numpy())


def logit_batches(
    vectors: np.ndarray,
    classifiers: Sequence[Classifier],
    mirrored: np.ndarray | None = None,
    *,
    device: torch.device | str = "cpu",
) -> Iterator[Tensor]:
    """Yield logits ``(G, B, C)`` of raw embeddings ``(N, D)``, batch by batch.

    The logits of the ``mirrored`` images are added if given: the paper's test-time augmentation for adaptive
    classification (section 4.2.1).
    """
    on_device = [(weight.detach().to(device), bias.detach().to(device)) for weight, bias in classifiers]
    views = [vectors] if mirrored is None else [vectors, mirrored]
    for batches in zip(*(_split(view, device) for view in views), strict=True):
        of_views = [torch.stack([F.linear(prefix(z, w.shape[1]), w, b) for w, b in on_device]) for z in batches]
        yield of_views[0] if mirrored is None else of_views[0] + of_views[1]


def _split(array: np.ndarray, device: torch.device | str) -> Iterator[Tensor]:
    for start in range(0, len(array), BATCH_SIZE):
        yield torch.from_numpy(np.array(array[start : start + BATCH_SIZE])).to(device)
