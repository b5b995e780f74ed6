"""Logits and predictions of every prefix, from embeddings alone: where the studies of classification start."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mrl.errors import UserError
from mrl.nesting import prefix
from mrl.progress import progress

Classifier = tuple[Tensor, Tensor]


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
    classifiers: Sequence[Classifier],
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
    classifiers: Sequence[Classifier],
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
