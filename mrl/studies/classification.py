"""Linear classification accuracy at every prefix size (paper, section 4.2, table 1)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mrl.errors import UserError
from mrl.nesting import prefix
from mrl.progress import progress
from mrl.results import Row, Source
from mrl.studies.finite import refuse_not_finite

STUDY = "classification"
Classifier = tuple[Tensor, Tensor]


def truncations(weight: Tensor, bias: Tensor, dims: Sequence[int]) -> list[Classifier]:
    """One classifier per size: the first ``dim`` columns of ``weight`` ``(C, D)``, with the whole ``bias`` ``(C,)``.

    On the fixed-feature model this is plain truncation: what a prefix is worth without nested training.
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
    batch_rows: int = 4096,
) -> list[Row]:
    """Rows of top-1 and top-5 accuracy, one pair per classifier; no top-5 where there are 5 classes or fewer.

    A prediction counts when fewer than 1 (or 5) classes score above the right one, where of equal
    scores the lower class comes first. Counts are whole numbers, divided once at the end.

    Args:
        vectors: Embeddings ``(N, D)``, raw.
        labels: ``(N,)`` int64.
        classifiers: Weight ``(C, dim)`` and bias ``(C,)`` of each size; reads the first dim coordinates.
        source: What the rows are of.
        method: The rows' method.
        device: Where to compute.
        batch_rows: Embeddings in memory at a time.

    Raises:
        UserError: There are no embeddings, a label is not one of the classes, or an embedding (the message names
            its row) or a classifier holds NaN or infinity.
    """
    classifiers = [(weight.detach().to(device), bias.detach().to(device)) for weight, bias in classifiers]
    num_classes = _check(vectors, labels, classifiers, source.run)
    ranks_wanted = {"top_1": 1, "top_5": 5} if num_classes > 5 else {"top_1": 1}
    counts = torch.zeros(len(classifiers), len(ranks_wanted), dtype=torch.int64, device=device)
    largest = max(weight.shape[1] for weight, _ in classifiers)
    with progress(total=len(vectors), desc=f"{source.run}: {STUDY}", unit="image") as bar:
        for start in range(0, len(vectors), batch_rows):
            rows = np.array(vectors[start : start + batch_rows], dtype=np.float32)
            z = torch.from_numpy(rows).to(device)
            # With NaN no class would score above the right one: every prediction would count.
            refuse_not_finite(z[:, :largest], start)
            truth = torch.from_numpy(np.array(labels[start : start + batch_rows], dtype=np.int64)).to(device)
            for g, (weight, bias) in enumerate(classifiers):
                ranks = true_ranks(F.linear(prefix(z, weight.shape[1]), weight, bias), truth)
                counts[g] += torch.stack([(ranks < k).sum() for k in ranks_wanted.values()])
            bar.update(len(rows))
    return [
        source.row(STUDY, method, metric, count / len(vectors), len(vectors), dim=weight.shape[1])
        for (weight, _), of_size in zip(classifiers, counts.tolist(), strict=True)
        for metric, count in zip(ranks_wanted, of_size, strict=True)
    ]


def true_ranks(logits: Tensor, labels: Tensor) -> Tensor:
    """Classes ``(B,)`` that come before the right one in ``logits`` ``(B, C)``: 0 is a correct top-1 prediction."""
    own = logits.gather(1, labels[:, None])
    lower_class = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    return ((logits > own) | ((logits == own) & lower_class)).sum(dim=1)


def _check(vectors: np.ndarray, labels: np.ndarray, classifiers: Sequence[Classifier], run: str) -> int:
    """The number of classes, once the input is known to be fit for counting."""
    if not len(vectors) or len(vectors) != len(labels):
        raise UserError(f"{run}: {len(vectors)} embeddings and {len(labels)} labels; give one label to each, and some")
    num_classes = len(classifiers[0][1])
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise UserError(
            f"{run}: labels go from {low} to {high}, but the classifier knows classes 0 to {num_classes - 1}"
        )
    for weight, bias in classifiers:
        if not (weight.isfinite().all() and bias.isfinite().all()):
            raise UserError(f"{run}: the classifier of {weight.shape[1]} dims holds NaN or infinity")
    return num_classes
