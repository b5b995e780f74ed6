"""A linear classifier fit on fixed embeddings (paper, section 4.1, baseline "linear probe" of table 1).

What a fixed-feature model gives at small sizes without nested training (paper, sections 4.1 and 4.2, tables 1, 2).

Each baseline is a change of coordinates after which the first ``dim`` of them are taken, so every one
is scored by the same code as the prefixes of MRL.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mrl.errors import UserError
from mrl.progress import progress
from mrl.results import Row, Source
from mrl.studies.classification import Classifier, classification, truncations
from mrl.studies.retrieval import retrieval, thin_indices

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
    that scale, minimized from zero by L-BFGS with a strong Wolfe line search over all images at once,
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
    if labels.min() < 0 or labels.max() >= num_classes:
        raise UserError(f"labels go from {labels.min()} to {labels.max()}; the classes are 0 to {num_classes - 1}")
    z = torch.empty(vectors.shape, dtype=torch.float32, device=device)
    for start in range(0, len(z), BATCH_ROWS):
        rows = slice(start, start + BATCH_ROWS)
        z[rows] = torch.from_numpy(np.array(vectors[rows], dtype=np.float32)).to(device)
    mean, deviation = _mean_and_deviation(z)
    deviation[deviation == 0] = 1
    z = z.sub_(mean).div_(deviation)
    truth = torch.from_numpy(np.array(labels, dtype=np.int64)).to(device)
    weight, bias = _minimize(z, truth, num_classes, l2, max_iterations)
    weight = weight / deviation
    return weight, bias - weight @ mean


def _mean_and_deviation(z: Tensor) -> tuple[Tensor, Tensor]:
    """Of each column of ``z`` ``(N, dim)``: two ``(dim,)`` in float32, computed in float64, in blocks."""
    # A sum of float32 in float64 is exact where all are equal, so that these deviate by 0.
    mean = sum(block.double().sum(dim=0) for block in z.split(BATCH_ROWS)) / len(z)
    squares = sum((block.double() - mean).square_().sum(dim=0) for block in z.split(BATCH_ROWS))
    return mean.float(), (squares / len(z)).sqrt().float()


def _minimize(z: Tensor, labels: Tensor, num_classes: int, l2: float, max_iterations: int) -> tuple[Tensor, Tensor]:
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


BATCH_ROWS_BASELINES = 8192

Transform = Callable[[np.ndarray], np.ndarray]  # (N, D) -> (N, width)


def retrieval_baselines(
    queries: np.ndarray,
    query_labels: np.ndarray,
    database: np.ndarray,
    database_labels: np.ndarray,
    dims: Sequence[int],
    source: Source,
    *,
    draws: int = 2,
    max_queries: int | None = None,
    ks: Sequence[int] = (10,),
    device: torch.device | str = "cpu",
) -> list[Row]:
    """Rows of the `retrieval` study at each size for four baselines on a fixed-feature model of full width.

    "FF PCA" (centered) and "FF SVD" (not centered) are fit on the database; "FF random coordinates" and
    "FF random projection" (Gaussian) are means over ``draws``. Random choices follow from the seed of
    the run. All are compared by cosine, as every embedding here is.

    Args:
        queries: Embeddings ``(Q, D)`` of the validation images, raw.
        query_labels: ``(Q,)`` whole numbers.
        database: Embeddings ``(N, D)`` of the training images, raw.
        database_labels: ``(N,)`` whole numbers.
        dims: Sizes, each 1 to D.
        source: What the rows are of.
        draws: How many random choices are averaged.
        max_queries: Of more queries, this many are taken, evenly spread; ``n`` tells.
        ks: As `retrieval`.
        device: Where to compute.

    Raises:
        UserError: As `retrieval`; or the database holds NaN or infinity.
    """
    chosen = thin_indices(len(queries), max_queries)
    queries, query_labels = queries[chosen], query_labels[chosen]
    check_dims(dims, database.shape[1])

    def rows_of(method: str, transform: Transform) -> list[Row]:
        both = transform(queries), transform(database)
        arrays = both[0], query_labels, both[1], database_labels
        return retrieval(*arrays, {method: dims}, source, ks=ks, device=device)

    mean, covariance = moments(database, device)
    uncentred = covariance + mean[:, None] * mean
    pca, svd = (principal_components(matrix, max(dims)) for matrix in (covariance, uncentred))
    rows = rows_of("FF PCA", lambda vectors: project(vectors, pca, mean, device=device))
    rows += rows_of("FF SVD", lambda vectors: project(vectors, svd, device=device))
    of_draws: dict[str, list[list[Row]]] = {"FF random coordinates": [], "FF random projection": []}
    for draw in range(draws):
        rng = np.random.default_rng((source.seed, draw))
        coordinates = rng.permutation(database.shape[1])[: max(dims)]
        gaussian = random_projection(database.shape[1], max(dims), rng)
        transforms: tuple[Transform, ...] = (
            lambda vectors, coordinates=coordinates: take_coordinates(vectors, coordinates),  # type: ignore[misc]
            lambda vectors, gaussian=gaussian: project(vectors, gaussian, device=device),  # type: ignore[misc]
        )
        for (method, found), transform in zip(of_draws.items(), transforms, strict=True):
            found.append(rows_of(method, transform))
    return rows + [row for found in of_draws.values() for row in mean_rows(found)]


def classification_baselines(
    train: np.ndarray,
    train_labels: np.ndarray,
    vectors: np.ndarray,
    labels: np.ndarray,
    classifier: Classifier,
    dims: Sequence[int],
    source: Source,
    *,
    device: torch.device | str = "cpu",
) -> list[Row]:
    """Rows of the `classification` study at each size for two baselines on a fixed-feature model of full width.

    "FF low-rank classifier" replaces the weight by its best approximation of rank ``dim`` and keeps the
    bias (the paper's SVD); only sizes up to the smaller of C and D exist. "FF random coordinates, probe" fits a linear
    classifier anew on ``dim`` random coordinates of the training images; see `fit_linear_probe`.

    Args:
        train: Embeddings ``(N, D)`` of the training images, raw.
        train_labels: ``(N,)`` whole numbers.
        vectors: Embeddings of the validation images, raw.
        labels: Theirs.
        classifier: The model's weight ``(C, D)`` and bias ``(C,)``.
        dims: Sizes, each 1 to D.
        source: What the rows are of.
        device: Where to compute.

    Raises:
        UserError: As `classification` and `fit_linear_probe`.
    """
    weight, bias = (part.detach() for part in classifier)
    check_dims(dims, train.shape[1])
    directions, scaled = low_rank(weight)
    ranks = [dim for dim in dims if dim <= scaled.shape[1]]
    classifiers = truncations(scaled.to(bias.dtype), bias, ranks)
    rows = []
    if ranks:
        reduced = project(vectors, directions, device=device)
        rows = classification(reduced, labels, classifiers, source, "FF low-rank classifier", device=device)
    coordinates = np.random.default_rng(source.seed).permutation(train.shape[1])[: max(dims)]
    chosen, of_train = take_coordinates(vectors, coordinates), take_coordinates(train, coordinates)
    probes = [
        fit_linear_probe(of_train[:, :dim], train_labels, len(bias), device=device)
        for dim in progress(dims, desc=f"{source.run}: linear probes", unit="size")
    ]
    return rows + classification(chosen, labels, probes, source, "FF random coordinates, probe", device=device)


def check_dims(dims: Sequence[int], width: int) -> None:
    """Nothing, once ``dims`` are known to be one or more sizes of 1 to ``width``.

    Raises:
        UserError: They are not.
    """
    if not dims or not all(1 <= dim <= width for dim in dims):
        raise UserError(f"sizes {list(dims)} must be one or more of 1 to {width}")


def moments(vectors: np.ndarray, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Mean ``(D,)`` and covariance ``(D, D)`` of ``vectors`` ``(N, D)`` in float64, read in blocks.

    Raises:
        UserError: A vector holds NaN or infinity; the message names its row.
    """
    width = vectors.shape[1]
    mean = torch.zeros(width, dtype=torch.float64, device=device)
    first_row = 0
    for block in _blocks(vectors, device, "principal directions: mean"):
        first_row += len(block)
        mean += block.double().sum(dim=0) / len(vectors)
    covariance = torch.zeros(width, width, dtype=torch.float64, device=device)
    for block in _blocks(vectors, device, "principal directions: covariance"):
        centered = block - mean.float()
        covariance += (centered.T @ centered).double() / len(vectors)
    return mean, covariance


def principal_components(matrix: Tensor, count: int) -> Tensor:
    """The eigenvectors ``(D, count)`` of the largest eigenvalues of a symmetric ``matrix``, largest first, float32."""
    return torch.linalg.eigh(matrix).eigenvectors.flip(1)[:, :count].float()


def low_rank(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Directions ``(D, R)`` and a weight ``(C, R)`` on them, whose first k columns make the best rank-k approximation.

    R is the smaller of C and D: ``(z @ directions[:, :k]) @ scaled[:, :k].T`` are the logits at rank k.
    """
    left, sizes, right = torch.linalg.svd(weight.double(), full_matrices=False)
    return right.T.float(), (left * sizes).float()


def random_projection(width: int, count: int, rng: np.random.Generator) -> Tensor:
    """A Gaussian matrix ``(width, count)``, scaled so that the mean squared length of what it projects stays (JL).

    Its first k columns are a projection to k coordinates, at another scale, which a cosine does not see.
    """
    return torch.from_numpy(rng.standard_normal((width, count), dtype=np.float32) / np.sqrt(np.float32(count)))


def project(
    vectors: np.ndarray, directions: Tensor, mean: Tensor | None = None, *, device: torch.device | str = "cpu"
) -> np.ndarray:
    """``(vectors - mean) @ directions``: ``(N, D)`` and ``(D, R)`` to ``(N, R)`` float32, read in blocks."""
    directions = directions.to(device)
    shift = 0 if mean is None else mean.float().to(device)
    projected = np.empty((len(vectors), directions.shape[1]), dtype=np.float32)
    first_row = 0
    for block in _blocks(vectors, device, "projection"):
        projected[first_row : first_row + len(block)] = ((block - shift) @ directions).cpu().numpy()
        first_row += len(block)
    return projected


def take_coordinates(vectors: np.ndarray, coordinates: np.ndarray) -> np.ndarray:
    """The columns ``coordinates`` of ``vectors``, in that order, as float32, read in blocks."""
    taken = np.empty((len(vectors), len(coordinates)), dtype=np.float32)
    for start in range(0, len(vectors), BATCH_ROWS_BASELINES):
        taken[start : start + BATCH_ROWS_BASELINES] = vectors[start : start + BATCH_ROWS_BASELINES][:, coordinates]
    return taken


def mean_rows(draws: Sequence[Sequence[Row]]) -> list[Row]:
    """The rows of the first draw with the mean of their values over all draws."""
    of_same = zip(*draws, strict=True)
    return [replace(same[0], value=sum(row.value for row in same) / len(same)) for same in of_same]


def _blocks(vectors: np.ndarray, device: torch.device | str, name: str) -> Iterator[Tensor]:
    with progress(total=len(vectors), desc=name, unit="vector") as bar:
        for start in range(0, len(vectors), BATCH_ROWS_BASELINES):
            block = np.array(vectors[start : start + BATCH_ROWS_BASELINES], dtype=np.float32)
            yield torch.from_numpy(block).to(device)
            bar.update(len(block))
