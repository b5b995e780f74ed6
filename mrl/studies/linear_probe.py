"""A linear classifier fit on fixed embeddings (paper, section 4.1, baseline "linear probe" of table 1)."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mrl.errors import UserError
from mrl.progress import progress
from mrl.studies.classification import Classifier
from mrl.studies.finite import refuse_not_finite
from mrl.studies.retrieval import check_labels

BATCH_ROWS = 8192


def fit_linear_probe(
    vectors: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    *,
    l2: float = 1e-4,
    max_iterations: int = 30,
    device: torch.device | str = "cpu",
) -> Classifier:
    """Weight ``(C, dim)`` and bias ``(C,)`` of multinomial logistic regression, for raw ``vectors`` ``(N, dim)``.

    The recipe, since the paper gives none: coordinates scaled to mean 0 and variance 1 over the
    training images, mean cross-entropy plus ``l2 / 2`` times the squared weights (not the biases) at
    that scale, minimised from zero by L-BFGS with a strong Wolfe line search over all images at once,
    no augmentation, no label smoothing. The same input gives the same classifier.

    Args:
        vectors: Embeddings of the training images; they are held on ``device`` as float32, once.
        labels: ``(N,)`` whole numbers, 0 to C - 1.
        num_classes: C.
        l2: Strength of the penalty.
        max_iterations: Of L-BFGS, at most; fewer where it converges.
        device: Where to compute.

    Raises:
        UserError: A label is not one of the classes, the labels do not fit the embeddings, or one of
            these holds NaN or infinity; the message names its row.
    """
    check_labels(vectors, labels, "training images")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise UserError(f"labels go from {labels.min()} to {labels.max()}; the classes are 0 to {num_classes - 1}")
    z = torch.empty(vectors.shape, dtype=torch.float32, device=device)
    for start in range(0, len(z), BATCH_ROWS):
        rows = slice(start, start + BATCH_ROWS)
        z[rows] = torch.from_numpy(np.array(vectors[rows], dtype=np.float32)).to(device)
        refuse_not_finite(z[rows], start, "training images' embeddings")
    mean, deviation = _mean_and_deviation(z)
    deviation[deviation == 0] = 1
    z = z.sub_(mean).div_(deviation)
    truth = torch.from_numpy(np.array(labels, dtype=np.int64)).to(device)
    weight, bias = _minimise(z, truth, num_classes, l2, max_iterations)
    weight = weight / deviation
    return weight, bias - weight @ mean


def _mean_and_deviation(z: Tensor) -> tuple[Tensor, Tensor]:
    """Of each column of ``z`` ``(N, dim)``: two ``(dim,)`` in float32, computed in float64, in blocks."""
    # A sum of float32 in float64 is exact where all are equal, so that these deviate by 0.
    mean = sum(block.double().sum(dim=0) for block in z.split(BATCH_ROWS)) / len(z)
    squares = sum((block.double() - mean).square_().sum(dim=0) for block in z.split(BATCH_ROWS))
    return mean.float(), (squares / len(z)).sqrt().float()


def _minimise(z: Tensor, labels: Tensor, num_classes: int, l2: float, max_iterations: int) -> tuple[Tensor, Tensor]:
    weight = torch.zeros(num_classes, z.shape[1], device=z.device, requires_grad=True)
    bias = torch.zeros(num_classes, device=z.device, requires_grad=True)
    max_passes = max_iterations * 5 // 4
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iterations,
        max_eval=max_passes,
        tolerance_grad=1e-5,
        history_size=10,
        line_search_fn="strong_wolfe",
    )
    with progress(total=max_passes, desc=f"linear probe, {z.shape[1]} dims", unit="pass", leave=False) as bar:

        def loss_and_gradient() -> Tensor:
            optimizer.zero_grad()
            total = l2 / 2 * weight.square().sum()
            total.backward()
            total = total.detach()
            # In blocks, for the logits of all images at once may not fit in memory.
            for rows, truth in zip(z.split(BATCH_ROWS), labels.split(BATCH_ROWS), strict=True):
                loss = F.cross_entropy(F.linear(rows, weight, bias), truth, reduction="sum") / len(z)
                loss.backward()
                total += loss.detach()
            bar.update()
            return total

        optimizer.step(loss_and_gradient)
    return weight.detach(), bias.detach()
