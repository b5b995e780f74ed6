"""What a fixed-feature model gives at small sizes without nested training (paper, section 4, tables 1 and 2).

Each baseline maps the embeddings to new coordinates and keeps the first ``dim`` of them, so the code that scores MRL's
prefixes scores every baseline too.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mrl.adapt import fit, principal_components
from mrl.progress import progress
from mrl.results import Row, Source
from mrl.retrieval.quantization import faiss_installed
from mrl.studies.classification import Classifier, classification, truncations
from mrl.studies.quantization import quantization
from mrl.studies.retrieval import retrieval

BATCH_SIZE = 8192


def retrieval_baselines(
    queries: np.ndarray,
    query_labels: np.ndarray,
    database: np.ndarray,
    database_labels: np.ndarray,
    dims: Sequence[int],
    source: Source,
    *,
    num_random: int = 2,
    max_queries: int | None = None,
    device: torch.device | str = "cpu",
    code: bool = True,
) -> list[Row]:
    """Return rows of the `retrieval` study at each size for four baselines of a fixed-feature model of full width.

    "FF PCA" (centered) and "FF SVD" (not centered) are fit on the database. "FF random coordinates" and "FF random
    projection" (Gaussian) are means over ``num_random`` random choices, which the run's seed determines. Embeddings
    ``(Q, D)`` and ``(N, D)`` are raw; other arguments as in `retrieval`. With ``code``, "FF PCA" has rows of
    `quantization` too.
    """
    from sklearn.random_projection import GaussianRandomProjection

    width = max(dims)
    mean = database.mean(axis=0, dtype=np.float64).astype(np.float32)
    pca, svd = (principal_components(database, center)[:, :width] for center in (mean, np.zeros_like(mean)))
    coordinates = [random_coordinates(database.shape[1], width, (source.seed, i)) for i in range(num_random)]
    seeds = [num_random * source.seed + i for i in range(num_random)]
    projections = [GaussianRandomProjection(width, random_state=seed).fit(database) for seed in seeds]
    methods: dict[str, list[Callable[[np.ndarray], np.ndarray]]] = {
        "FF PCA": [lambda vectors: (vectors - mean) @ pca],
        "FF SVD": [lambda vectors: vectors @ svd],
        "FF random coordinates": [partial(np.take, indices=chosen, axis=1) for chosen in coordinates],
        "FF random projection": [projection.transform for projection in projections],
    }
    rows = []
    for method, transforms in methods.items():
        found = []
        for transform in transforms:
            arrays = (transform(queries), query_labels, transform(database), database_labels)
            found.append(retrieval(*arrays, {method: dims}, source, ks=(10,), max_queries=max_queries, device=device))
            if code and method == "FF PCA" and faiss_installed():  # here, while the projected embeddings are in memory
                rows += quantization(*arrays, found[0], max_queries=max_queries, device=device)
        for same in zip(*found, strict=True):
            rows.append(replace(same[0], value=float(np.mean([row.value for row in same]))))
    return rows


def learned_baselines(
    queries: np.ndarray,
    query_labels: np.ndarray,
    database: np.ndarray,
    database_labels: np.ndarray,
    dims: Sequence[int],
    source: Source,
    *,
    max_queries: int | None = None,
    device: torch.device | str = "cpu",
) -> list[Row]:
    """Return rows of the `retrieval` study at each size for three linear maps learned from stored embeddings.

    "FF LDA" is scikit-learn's with shrinkage, not centered, up to C - 1 dims. "FF supervised map" and "FF unsupervised
    map" are those of `mrl.adapt.fit` with and without labels, one of each for the run's seed. All are fit on the
    database; arguments as in `retrieval_baselines`.
    """
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    fit_map = partial(fit, database, dims=dims, seed=source.seed, device=device, show_progress=True)
    methods: dict[str, Callable[[np.ndarray], np.ndarray]] = {}
    try:
        lda = LinearDiscriminantAnalysis(solver="eigen", shrinkage="auto").fit(database, database_labels)
        methods["FF LDA"] = lda.transform
    except ValueError as error:  # also numpy's LinAlgError: one class, or too few images of each
        warnings.warn(f"{source.run}: FF LDA is left out: {error}", stacklevel=2)
    methods |= {"FF supervised map": fit_map(database_labels), "FF unsupervised map": fit_map()}
    rows = []
    for method, transform in methods.items():
        arrays = (transform(queries), query_labels, transform(database), database_labels)
        fitting = {method: [dim for dim in dims if dim <= arrays[0].shape[1]]}
        if fitting[method]:
            rows += retrieval(*arrays, fitting, source, ks=(10,), max_queries=max_queries, device=device)
    return rows


def random_coordinates(width: int, count: int, seed: int | tuple[int, ...]) -> np.ndarray:
    """Return ``count`` different coordinates of ``width``, int64, in random order."""
    return np.random.default_rng(seed).permutation(width)[:count]


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
    """Return rows of the `classification` study at each size for two baselines of a fixed-feature model of full width.

    "FF low-rank classifier" (the paper's SVD) replaces the weight by its best approximation of rank ``dim``, which
    exists up to min(C, D), and keeps the bias. "FF random coordinates, probe" fits a linear classifier on ``dim``
    random coordinates of the training images. ``train`` and ``vectors`` are raw embeddings of training and validation
    images; ``classifier`` is the model's weight ``(C, D)`` and bias ``(C,)``.
    """
    weight, bias = (part.detach() for part in classifier)
    directions, scaled = low_rank(weight)
    classifiers = truncations(scaled, bias, [dim for dim in dims if dim <= scaled.shape[1]])
    rows = []
    if classifiers:
        reduced = vectors @ directions.numpy(force=True)
        rows = classification(reduced, labels, classifiers, source, "FF low-rank classifier", device=device)
    chosen = random_coordinates(train.shape[1], max(dims), source.seed)
    probes = [
        fit_linear_probe(train.take(chosen[:dim], axis=1), train_labels, len(bias), device=device)
        for dim in progress(dims, desc=f"{source.run}: linear probes", unit="size")
    ]
    of_chosen = vectors.take(chosen, axis=1)
    return rows + classification(of_chosen, labels, probes, source, "FF random coordinates, probe", device=device)


def low_rank(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return directions ``(D, R)`` and a weight ``(C, R)`` on them, R = min(C, D).

    The logits of the best rank-k approximation of ``weight`` are ``(z @ directions[:, :k]) @ scaled[:, :k].T``.
    """
    left, sizes, right = torch.linalg.svd(weight.double(), full_matrices=False)
    return right.T.to(weight.dtype), (left * sizes).to(weight.dtype)


def fit_linear_probe(
    vectors: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    *,
    l2: float = 1e-4,
    max_iterations: int = 30,
    device: torch.device | str = "cpu",
) -> Classifier:
    """Fit multinomial logistic regression on raw ``vectors`` ``(N, dim)``: weight ``(C, dim)`` and bias ``(C,)``.

    The paper gives no recipe. This one standardizes the coordinates, adds ``l2 / 2`` times the squared weights at that
    scale to the mean cross-entropy, and minimizes from zero by full-batch L-BFGS. scikit-learn's LogisticRegression
    would need all logits of a training set at once, and a CPU.
    """
    z = torch.from_numpy(np.array(vectors, dtype=np.float32)).to(device)
    truth = torch.from_numpy(np.array(labels)).to(device)
    std, mean = torch.std_mean(z, dim=0, correction=0)
    std[std == 0] = 1
    z.sub_(mean).div_(std)
    weight = torch.zeros(num_classes, z.shape[1], device=device, requires_grad=True)
    bias = torch.zeros(num_classes, device=device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=max_iterations, tolerance_grad=1e-5, history_size=10, line_search_fn="strong_wolfe"
    )

    def loss_and_gradient() -> Tensor:
        optimizer.zero_grad()
        total = l2 / 2 * weight.square().sum()
        total.backward()
        # In blocks: the logits of all images at once may not fit in memory.
        for block, of_block in zip(z.split(BATCH_SIZE), truth.split(BATCH_SIZE), strict=True):
            loss = F.cross_entropy(F.linear(block, weight, bias), of_block, reduction="sum") / len(z)
            loss.backward()
            total = total.detach() + loss.detach()
        return total

    optimizer.step(loss_and_gradient)
    weight, bias = weight.detach() / std, bias.detach()
    return weight, bias - weight @ mean
