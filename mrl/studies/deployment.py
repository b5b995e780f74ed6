"""What adaptive classification and retrieval take in use: measured milliseconds and bytes, beside quality."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mrl.errors import UserError
from mrl.models import MatryoshkaClassifier
from mrl.nesting import prefix
from mrl.studies.cascade import draws
from mrl.studies.logits import Classifier, predict
from mrl.studies.thresholds import fit_thresholds

BYTES_PER_NUMBER = 4
REPEATS = 5


class CascadePoint(NamedTuple):
    """A cascade that may go up to size ``cap``, or one classifier alone.

    Attributes:
        cap: Largest size that may decide, in dims.
        top_1: Accuracy on the images that no threshold was fitted on.
        expected_dim: Mean size that decided.
        bytes_per_image: Of the embedding, that were read to decide, mean.
        us_per_image: Measured microseconds an image, from embeddings to classes, all in one batch.
    """

    cap: int
    top_1: float
    expected_dim: float
    bytes_per_image: float
    us_per_image: float


def run_cascade(vectors: Tensor, classifiers: Sequence[Classifier], thresholds: np.ndarray) -> tuple[Tensor, Tensor]:
    """Predicted classes ``(N,)`` and the granularity ``(N,)`` that decided, larger prefixes read only where needed.

    The same as `mrl.route` on the confidences of all sizes, but here the classifier of a size sees only the images
    that no smaller one was sure of.

    Args:
        vectors: Embeddings ``(N, D)``, raw.
        classifiers: Weight ``(C, dim)`` and bias ``(C,)`` of G sizes, ascending.
        thresholds: ``(G-1,)``.
    """
    classes = torch.empty(len(vectors), dtype=torch.int64)
    chosen = torch.empty(len(vectors), dtype=torch.int64)
    left = torch.arange(len(vectors))
    for g, (weight, bias) in enumerate(classifiers):
        logits = F.linear(prefix(vectors[left], weight.shape[1]), weight, bias)
        best, of_size = logits.max(dim=1)
        confidence = (best - logits.logsumexp(dim=1)).exp().clamp(max=1).double()
        sure = confidence > thresholds[g] if g < len(thresholds) else torch.ones_like(confidence, dtype=torch.bool)
        classes[left[sure]], chosen[left[sure]] = of_size[sure], g
        left = left[~sure]
    return classes, chosen


@torch.inference_mode()
def cascade_points(
    vectors: np.ndarray, labels: np.ndarray, classifiers: Sequence[Classifier]
) -> tuple[list[CascadePoint], list[CascadePoint]]:
    """Points of the cascade, one per cap from the second size on, and of each size's classifier alone.

    Thresholds are fitted as the paper does on the first draw of `mrl.studies.cascade.draws`; everything is scored
    and timed on the others of ``vectors``, on the CPU, the shortest of five times.

    Args:
        vectors: Embeddings ``(N, D)`` of validation images, raw.
        labels: ``(N,)`` int64.
        classifiers: Weight ``(C, dim)`` and bias ``(C,)`` of G sizes, ascending.

    Raises:
        UserError: There is one size only, or there are fewer than 5 images.
    """
    if len(classifiers) < 2:
        raise UserError("a cascade needs two or more sizes, but was given one")
    fit, test = next(draws(len(vectors), 1))
    fitted = predict(vectors[fit], classifiers)
    thresholds = fit_thresholds(fitted.confidence, fitted.classes == labels[fit])
    z, truth = torch.from_numpy(np.array(vectors[test])), torch.from_numpy(np.array(labels[test]))
    cascades = [_point(z, truth, classifiers[: cap + 1], thresholds[:cap]) for cap in range(1, len(classifiers))]
    alone = [_point(z, truth, [classifier], thresholds[:0]) for classifier in classifiers]
    return cascades, alone


@torch.inference_mode()
def backbone_ms_per_image(model: MatryoshkaClassifier, images: Tensor) -> float:
    """Measured milliseconds an image of the backbone, on the CPU, ``images`` ``(B, 3, H, W)`` in one batch."""
    return 1000 * _fastest(lambda: model.embed(images), 3) / len(images)


def _point(z: Tensor, labels: Tensor, classifiers: Sequence[Classifier], thresholds: np.ndarray) -> CascadePoint:
    classes, chosen = run_cascade(z, classifiers, thresholds)
    seconds = _fastest(lambda: run_cascade(z, classifiers, thresholds), REPEATS)
    dims = torch.tensor([weight.shape[1] for weight, _ in classifiers], dtype=torch.float64)
    expected = float(dims[chosen].mean())
    top_1 = float((classes == labels).double().mean())
    # A larger prefix holds the smaller ones: what was read once is not read again.
    return CascadePoint(int(dims[-1]), top_1, expected, BYTES_PER_NUMBER * expected, 1e6 * seconds / len(z))


def _fastest(function, repeats: int) -> float:  # type: ignore[no-untyped-def]
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
