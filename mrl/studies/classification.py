"""Linear classification at every prefix size (paper, section 4.2, table 1), from embeddings and the head alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mrl.matryoshka import prefix
from mrl.progress import progress
from mrl.results import Row, Source

STUDY = "classification"
BATCH_SIZE = 2048
# Weight (C, dim), applied to the first dim coordinates of an embedding, and bias (C,).
Classifier = tuple[Tensor, Tensor]


class Predictions(NamedTuple):
    """Predictions of G classifiers for N images.

    Attributes:
        classes: ``(G, N)`` int64, the class of the highest logit; of equal logits, the lowest class.
        confidence: ``(G, N)`` float32, the softmax of that class.
    """

    classes: np.ndarray
    confidence: np.ndarray


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
    batch_size: int = BATCH_SIZE,
) -> list[Row]:
    """Return rows of top-1 and top-5 accuracy per classifier; no top-5 for 5 classes or fewer.

    A prediction is correct if fewer than 1 (or 5) classes score above the label. Of equal scores, the lower class
    comes first.

    Args:
        vectors: Embeddings ``(N, D)``, raw.
        labels: ``(N,)`` int64.
        classifiers: G of them, with the same C classes.
        source: Shared fields of the rows.
        method: Method of the rows.
        device: Where to compute.
        batch_size: Embeddings in memory at a time.
    """
    ranks_wanted = {"top_1": 1, "top_5": 5} if len(classifiers[0][1]) > 5 else {"top_1": 1}
    counts = torch.zeros(len(classifiers), len(ranks_wanted), dtype=torch.int64, device=device)
    start = 0
    with progress(total=len(vectors), desc=f"{source.run}: {STUDY}", unit="image") as bar:
        for logits in logit_batches(vectors, classifiers, device=device, batch_size=batch_size):
            truth = torch.from_numpy(np.array(labels[start : start + logits.shape[1]])).to(device)
            for g, of_size in enumerate(logits):
                ranks = true_ranks(of_size, truth)
                counts[g] += torch.stack([(ranks < k).sum() for k in ranks_wanted.values()])
            start += len(truth)
            bar.update(len(truth))
    return [
        source.row(STUDY, method, metric, count / len(vectors), len(vectors), dim=weight.shape[1])
        for (weight, _), of_size in zip(classifiers, counts.tolist(), strict=True)
        for metric, count in zip(ranks_wanted, of_size, strict=True)
    ]


def true_ranks(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the number of classes ``(B,)`` ahead of the label in ``logits`` ``(B, C)``; 0 is a correct prediction."""
    own = logits.gather(1, labels[:, None])
    lower_class = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    return ((logits > own) | ((logits == own) & lower_class)).sum(dim=1)


def predict(
    vectors: np.ndarray,
    classifiers: Sequence[Classifier],
    mirrored: np.ndarray | None = None,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = BATCH_SIZE,
) -> Predictions:
    """Return the predicted class of every image at every size and its confidence; arguments as in `logit_batches`."""
    classes = np.empty((len(classifiers), len(vectors)), dtype=np.int64)
    confidence = np.empty(classes.shape, dtype=np.float32)
    start = 0
    with progress(total=len(vectors), desc="predictions", unit="image") as bar:
        for logits in logit_batches(vectors, classifiers, mirrored, device=device, batch_size=batch_size):
            batch = slice(start, start := start + logits.shape[1])
            best, indices = logits.max(dim=2)
            classes[:, batch] = indices.cpu().numpy()
            confidence[:, batch] = (best - logits.logsumexp(dim=2)).exp().clamp(max=1).cpu().numpy()
            bar.update(logits.shape[1])
    return Predictions(classes, confidence)


def logit_batches(
    vectors: np.ndarray,
    classifiers: Sequence[Classifier],
    mirrored: np.ndarray | None = None,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = BATCH_SIZE,
) -> Iterator[Tensor]:
    """Yield the logits ``(G, B, C)`` of all embeddings, batch by batch.

    Args:
        vectors: Embeddings ``(N, D)``, raw; may be memory-mapped.
        classifiers: G of them, with the same C classes.
        mirrored: Embeddings ``(N, D)`` of the mirrored images. Their logits are added: the paper's test-time
            augmentation for adaptive classification (section 4.2.1).
        device: Where to compute.
        batch_size: Embeddings in memory at a time.
    """
    on_device = [(weight.detach().to(device), bias.detach().to(device)) for weight, bias in classifiers]

    def logits(view: np.ndarray, start: int) -> Tensor:
        z = torch.from_numpy(np.array(view[start : start + batch_size], dtype=np.float32)).to(device)
        return torch.stack([F.linear(prefix(z, weight.shape[1]), weight, bias) for weight, bias in on_device])

    for start in range(0, len(vectors), batch_size):
        of_batch = logits(vectors, start)
        yield of_batch if mirrored is None else of_batch + logits(mirrored, start)
