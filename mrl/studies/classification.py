"""The refusal of embeddings that hold NaN or infinity, whose scores would mean nothing.

Linear classification accuracy at every prefix size (paper, section 4.2, table 1).

Logits and predictions of every prefix, from embeddings alone: where the studies of classification start.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mrl.errors import UserError
from mrl.matryoshka import prefix
from mrl.progress import progress
from mrl.results import Row, Source

BATCH_ROWS = 4096


def refuse_not_finite(block: Tensor, first_row: int = 0, name: str = "embeddings") -> None:
    """Nothing, if every row of ``block`` ``(B, D)``, whose first is row ``first_row`` of all, is finite.

    Raises:
        UserError: One is not; the message names the first such row.
    """
    finite = block.isfinite().all(dim=1)
    if not finite.all():
        row = first_row + int((~finite).nonzero()[0])
        raise UserError(f"row {row} of the {name} holds NaN or infinity; embed the images anew with a sound model")


def refuse_array_not_finite(vectors: np.ndarray) -> None:
    """Nothing, if all of ``vectors`` ``(N, D)`` are finite; read in blocks. Error as `refuse_not_finite`."""
    for start in range(0, len(vectors), BATCH_ROWS):
        refuse_not_finite(torch.from_numpy(np.array(vectors[start : start + BATCH_ROWS])), start)


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


Classifier_logits = tuple[Tensor, Tensor]


class Predictions(NamedTuple):
    """What G classifiers say of N images.

    Attributes:
        classes: ``(G, N)`` int64, the class of the highest logit, the lower class among equals.
        confidence: ``(G, N)`` float32, the softmax of that class.
    """

    classes: np.ndarray
    confidence: np.ndarray


def logit_batches(
    vectors: np.ndarray,
    classifiers: Sequence[Classifier_logits],
    mirrored: np.ndarray | None = None,
    *,
    device: torch.device | str = "cpu",
    batch_rows: int = 2048,
) -> Iterator[Tensor]:
    """Logits ``(G, B, C)`` of all embeddings in batches, in order.

    Args:
        vectors: Embeddings ``(N, D)``, raw; may be memory-mapped.
        classifiers: Weight ``(C, dim)`` and bias ``(C,)`` of each size; reads the first dim coordinates.
        mirrored: Embeddings ``(N, D)`` of the same images mirrored, whose logits are then **added**: the
            paper's test-time augmentation of adaptive classification (section 4.2.1). A sum, not a
            mean, so that confidences are sharper than those of one view.
        device: Where to compute.
        batch_rows: Embeddings in memory at a time.

    Raises:
        UserError: The mirrored embeddings are not of the same shape, or a logit is not finite; the message
            names the image.
    """
    if mirrored is not None and mirrored.shape != vectors.shape:
        raise UserError(f"embeddings are {vectors.shape} and those of the mirrored images {mirrored.shape}; make both")
    on_device = [(weight.detach().to(device), bias.detach().to(device)) for weight, bias in classifiers]
    views = [vectors] if mirrored is None else [vectors, mirrored]
    for start in range(0, len(vectors), batch_rows):
        logits = torch.zeros(())
        for view in views:
            z = torch.from_numpy(np.array(view[start : start + batch_rows], dtype=np.float32)).to(device)
            of_view = torch.stack([F.linear(prefix(z, w.shape[1]), w, b) for w, b in on_device])
            logits = of_view if view is vectors else logits + of_view
        finite = logits.isfinite().all(dim=2).all(dim=0)
        if not finite.all():
            row = start + int((~finite).nonzero()[0])
            raise UserError(f"the logits of image {row} hold NaN or infinity, so it has no predicted class")
        yield logits


def predict(
    vectors: np.ndarray,
    classifiers: Sequence[Classifier_logits],
    mirrored: np.ndarray | None = None,
    *,
    device: torch.device | str = "cpu",
    batch_rows: int = 2048,
) -> Predictions:
    """The predicted class of every image at every size, and how sure it is; arguments as `logit_batches`.

    Raises:
        UserError: There are no embeddings, or as `logit_batches`.
    """
    if not len(vectors):
        raise UserError("there are no embeddings, so there is nothing to predict; give at least one")
    classes = np.empty((len(classifiers), len(vectors)), dtype=np.int64)
    confidence = np.empty(classes.shape, dtype=np.float32)
    start = 0
    with progress(total=len(vectors), desc="predictions", unit="image") as bar:
        for logits in logit_batches(vectors, classifiers, mirrored, device=device, batch_rows=batch_rows):
            rows = slice(start, start := start + logits.shape[1])
            best, at = logits.max(dim=2)
            classes[:, rows] = at.cpu().numpy()
            confidence[:, rows] = (best - logits.logsumexp(dim=2)).exp().clamp(max=1).cpu().numpy()
            bar.update(logits.shape[1])
    return Predictions(classes, confidence)
