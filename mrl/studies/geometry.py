"""The geometry of nested embeddings: cosines of pairs (paper, appendix E, table 6) and what the notebooks show.

The notebooks look at blocks of coordinates, maps of prefixes, neighbors at growing sizes, and Grad-CAM (Selvaraju et
al., 2017), all as arrays; `mrl.figures` draws them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mrl.errors import UserError
from mrl.matryoshka import prefix, unit_prefix
from mrl.model import MatryoshkaClassifier
from mrl.results import Row, Source
from mrl.retrieval.search import Neighbors
from mrl.studies.classification import Classifier

NUM_SHOWN = 4
MIN_MAP_SIDE = 4


def similarity(
    vectors: np.ndarray,
    labels: np.ndarray,
    dims: Sequence[int],
    source: Source,
    method: str,
    *,
    num_pairs: int = 10_000,
) -> list[Row]:
    """Return rows of the mean cosine, in [-1, 1], of pairs at each size: cosine_positive and cosine_random.

    A positive pair is two images of one class (in the paper, an image and its caption), a random pair any two images.
    Arguments as in `cosines`; there are no rows of positive pairs if no class has two images.
    """
    rows = []
    for dim, found in cosines(vectors, labels, dims, num_pairs).items():
        for metric, values in zip(("cosine_positive", "cosine_random"), found, strict=True):
            if len(values):
                rows.append(source.row("similarity", method, metric, float(values.mean()), len(values), dim=dim))
    return rows


def cosines(
    vectors: np.ndarray, labels: np.ndarray, dims: Sequence[int], num_pairs: int = 5000, seed: int = 0
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Return ``{dim: (cosines of positive pairs, cosines of random pairs)}``, of the same pairs at every size.

    ``num_pairs`` of each kind are sampled with replacement from raw embeddings ``(N, D)`` with labels ``(N,)``.
    """
    rng = np.random.default_rng(seed)
    kinds = [positive_pairs(labels, num_pairs, rng), positive_pairs(np.zeros_like(labels), num_pairs, rng)]
    sides = [torch.from_numpy(np.array(vectors[pairs], dtype=np.float32)) for pairs in kinds]  # (P, 2, D)
    found = {}
    for dim in dims:
        positive, random = (unit_prefix(z, dim).double().prod(dim=1).sum(dim=1).clamp(-1, 1).numpy() for z in sides)
        found[dim] = positive, random
    return found


def positive_pairs(labels: np.ndarray, num_pairs: int, rng: np.random.Generator) -> np.ndarray:
    """Return indices ``(num_pairs, 2)`` of pairs of different images of one class; ``(0, 2)`` if there are none.

    The first image is any that shares its class, the second any other of its class, each with equal probability.
    """
    order = np.argsort(labels, kind="stable")
    _, class_starts, class_sizes = np.unique(labels[order], return_index=True, return_counts=True)
    starts, sizes = np.repeat(class_starts, class_sizes), np.repeat(class_sizes, class_sizes)
    shared = np.flatnonzero(sizes > 1)
    if not len(shared):
        return np.empty((0, 2), dtype=np.int64)
    first = rng.choice(shared, num_pairs)
    start, size = starts[first], sizes[first]
    second = start + (first - start + rng.integers(1, size)) % size
    return np.stack([order[first], order[second]], axis=1)


class Blocks(NamedTuple):
    """Statistics of blocks of coordinates; block g ends at ``dims[g]`` and begins where the one before ends."""

    dims: tuple[int, ...]  # G sizes, ascending
    variance: np.ndarray  # (G,) mean variance of a coordinate, divided by that of all coordinates
    between: np.ndarray  # (G,) share of the block's variance that lies between class means
    prefix_rank: np.ndarray  # (G,) effective rank of each prefix


def blocks(vectors: np.ndarray, labels: np.ndarray, dims: Sequence[int]) -> Blocks:
    """Return the `Blocks` of raw embeddings ``(N, D)`` with labels ``(N,)``, for ascending ``dims``."""
    z = np.asarray(vectors[:, : dims[-1]], dtype=np.float64)
    z = z - z.mean(axis=0)
    _, index, counts = np.unique(labels, return_inverse=True, return_counts=True)
    sums = np.zeros((len(counts), z.shape[1]))
    np.add.at(sums, index, z)
    variance, between = z.var(axis=0), (sums / counts[:, None])[index].var(axis=0)
    spans = [slice(*span) for span in itertools.pairwise([0, *dims])]
    return Blocks(
        tuple(dims),
        variance=np.array([variance[span].mean() / (variance.mean() or 1) for span in spans]),
        between=np.array([between[span].sum() / (variance[span].sum() or 1) for span in spans]),
        prefix_rank=np.array([effective_rank(z[:, :dim]) for dim in dims]),
    )


def describe_blocks(by_run: Mapping[str, Blocks]) -> str:
    """Return what `blocks` found in one sentence per run."""
    return "\n".join(
        f"{name}: a coordinate of the first {found.dims[0]} dims has {found.variance[0]:.1f} times the mean variance, "
        f"{found.between[0]:.0%} of it between classes; of the last block ({[0, *found.dims][-2]} to "
        f"{found.dims[-1]} dims) {found.variance[-1]:.1f} times, {found.between[-1]:.0%}; effective rank "
        f"{found.prefix_rank[-1]:.1f} of all."
        for name, found in by_run.items()
    )


def effective_rank(centered: np.ndarray) -> float:
    """Return the exponential of the entropy of the covariance's normalized eigenvalues (Roy and Vetterli, 2007).

    For ``(N, d)`` columns of mean 0 it lies between 1 (one direction) and d (equal variance); 0 without variance.
    """
    shares = np.linalg.svd(centered, compute_uv=False) ** 2
    if not shares.any():
        return 0.0
    shares = shares[shares > 0] / shares.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def maps(vectors: np.ndarray, dims: Sequence[int]) -> dict[int, np.ndarray]:
    """Return ``{dim: (N, 2)}``: a t-SNE map of the unit prefixes of each size."""
    from sklearn.manifold import TSNE

    z = torch.from_numpy(np.array(vectors, dtype=np.float32))
    tsne = TSNE(perplexity=min(30.0, (len(z) - 1) / 3), init="random", random_state=0)
    return {dim: tsne.fit_transform(unit_prefix(z, dim).numpy()) for dim in dims}


def describe_maps(maps: Mapping[int, np.ndarray], labels: np.ndarray, k: int = 5) -> str:
    """Return how often the ``k`` nearest points on a map have a point's color, the labels ``(N,)``, as a sentence."""
    from sklearn.neighbors import NearestNeighbors

    found = {dim: NearestNeighbors(n_neighbors=k).fit(places).kneighbors() for dim, places in maps.items()}
    right = {dim: (labels[indices] == labels[:, None]).mean() for dim, (_, indices) in found.items()}
    shares = ", ".join(f"{share:.0%} at {dim}" for dim, share in right.items())
    chance = (np.bincount(labels) * (np.bincount(labels) - 1)).sum() / (len(labels) * (len(labels) - 1))
    return f"Of the {k} nearest points on the map, of a point's own color: {shares} dims; by chance {chance:.0%}."


def describe_cosines(cosines: Mapping[int, tuple[np.ndarray, np.ndarray]]) -> str:
    """Return how often a pair of one class has a higher cosine than a random pair, the area under the ROC curve."""
    from sklearn.metrics import roc_auc_score

    areas = {
        dim: roc_auc_score(np.repeat([1, 0], [len(positive), len(random)]), np.concatenate([positive, random]))
        for dim, (positive, random) in cosines.items()
        if len(positive)
    }
    shares = ", ".join(f"{area:.1%} at {dim}" for dim, area in areas.items())
    return f"A pair of one class has a higher cosine than a random pair in {shares} dims; by chance 50%."


def shown_sizes(dims: Sequence[int]) -> list[int]:
    """Return up to four of ``dims`` for a figure: the smallest, every second one after it, and the largest.

    >>> shown_sizes([8, 16, 32, 64, 128, 256, 512, 1024, 2048])
    [8, 32, 128, 2048]
    """
    return sorted({*dims[:-1:2][: NUM_SHOWN - 1], dims[-1]})


def describe_neighbors(found: Mapping[int, Neighbors], query_labels: np.ndarray, database_labels: np.ndarray) -> str:
    """Return the share of neighbors of the query's class at each size, over all queries, as a sentence."""
    right = {dim: (database_labels[rows] == query_labels[:, None]).mean() for dim, (rows, _) in found.items()}
    number = next(iter(found.values()))[0].shape[1]
    shares = ", ".join(f"{share:.1%} at {dim}" for dim, share in right.items())
    return f"Of the {number} nearest neighbors of {len(query_labels):,} queries, of the query's class: {shares} dims."


def typical_queries(
    found: Mapping[int, Neighbors], query_labels: np.ndarray, database_labels: np.ndarray, num_queries: int
) -> np.ndarray:
    """Return the indices ``(num_queries,)`` of the queries closest to the average of all.

    Those are the ones whose numbers of right neighbors at the sizes differ least, in squares, from the mean numbers.
    Other arguments, and one query of each class, as in `telling_queries`.
    """
    right = np.stack([(database_labels[rows] == query_labels[:, None]).sum(axis=1) for rows, _ in found.values()])
    return _one_of_each_class(((right - right.mean(axis=1, keepdims=True)) ** 2).sum(axis=0), query_labels, num_queries)


def telling_queries(
    found: Mapping[int, Neighbors], query_labels: np.ndarray, database_labels: np.ndarray, num_queries: int
) -> np.ndarray:
    """Return the indices ``(num_queries,)`` of the queries whose neighbors improve most from smallest to largest size.

    At most one query of each class while there are classes left; of equal gains, the first. ``found`` is the result
    of `mrl.exact_search`. Made for display: the choice is not representative.
    """
    right = {dim: (database_labels[rows] == query_labels[:, None]).sum(axis=1) for dim, (rows, _) in found.items()}
    return _one_of_each_class(right[min(right)] - right[max(right)], query_labels, num_queries)


def _one_of_each_class(losses: np.ndarray, query_labels: np.ndarray, num_queries: int) -> np.ndarray:
    order = np.argsort(losses, kind="stable")
    _, firsts = np.unique(query_labels[order], return_index=True)
    others = np.setdiff1d(np.arange(len(order)), firsts)
    return order[np.concatenate([np.sort(firsts), others])[:num_queries]]


def revised_images(classes: np.ndarray, confidence: np.ndarray, num_images: int) -> np.ndarray:
    """Return the indices ``(num_images,)`` of images that the largest size takes for another class than the smallest.

    The images of which the largest size is most confident come first, one of each class that it predicts while there
    are classes left. ``classes`` and ``confidence`` ``(G, N)`` are those of `predict`.
    """
    losses = np.where(classes[0] != classes[-1], -confidence[-1], 1)
    return _one_of_each_class(losses, classes[-1], num_images)


def describe_heat(heat: np.ndarray, dims: Sequence[int]) -> str:
    """Return how the maps ``(G, B, H, W)`` of `grad_cams` at each size correlate with those at the largest.

    A map without evidence, which is constant, counts as a correlation of 0.
    """
    z = heat - heat.mean(axis=(2, 3), keepdims=True)
    z = z / np.linalg.norm(z, axis=(2, 3), keepdims=True).clip(min=1e-9)
    means = (z * z[-1]).sum(axis=(2, 3)).mean(axis=1)
    found = ", ".join(f"{mean:.2f} at {dim}" for mean, dim in zip(means[:-1], dims, strict=False))
    return f"Mean correlation of these maps with those at {dims[-1]} dims: {found} dims."


def grad_cams(
    model: MatryoshkaClassifier, images: Tensor, classifiers: Sequence[Classifier], targets: np.ndarray
) -> np.ndarray:
    """Return Grad-CAM heat maps ``(G, B, H, W)``, 0 to 1 in each map: the evidence for the target classes at each size.

    The score is the logit of each prefix's own classifier. The maps come from the backbone's last stage that has at
    least 4 x 4 cells and that the scores depend on (of a transformer's last block they may read the class token alone).

    ``images`` ``(B, 3, H, W)`` are normalized and on the device of the model, which is in eval mode; ``targets`` are
    ``(G, B)`` int64, for G ``classifiers``.

    Raises:
        UserError: The backbone has no such stage.
    """
    outputs: list[Tensor] = []
    stages: Any = getattr(model.backbone, "feature_info", None) or []
    layers = [model.backbone.get_submodule(stage["module"]) for stage in stages]
    hooks = [layer.register_forward_hook(lambda _, __, output: outputs.append(output)) for layer in layers]
    z = model.embed(images)
    for hook in hooks:
        hook.remove()
    scores = [
        F.linear(prefix(z, weight.shape[1]), weight, bias).gather(1, torch.from_numpy(of_size)[:, None].to(z.device))
        for (weight, bias), of_size in zip(classifiers, targets, strict=True)
    ]
    for stage, output in reversed(list(zip(stages, outputs, strict=True))):
        maps, *slopes = (
            _to_maps(model, values, stage["num_chs"])
            for values in (
                output,
                *(torch.autograd.grad(score.sum(), output, retain_graph=True)[0] for score in scores),
            )
        )
        if min(maps.shape[2:]) >= MIN_MAP_SIDE and all(slope.any() for slope in slopes):
            return np.stack([_heat(maps, slope, images.shape[2:]) for slope in slopes])
    raise UserError(
        f"Grad-CAM needs a stage with {MIN_MAP_SIDE} x {MIN_MAP_SIDE} cells or more, and none of the {len(stages)} "
        f"that timm lists for this backbone has as many for images of {images.shape[-1]} px"
    )


def _heat(maps: Tensor, slopes: Tensor, size: Sequence[int]) -> np.ndarray:
    """Sum the channels of ``maps`` ``(B, channels, h, w)``, weighted by their mean slope; ``(B, H, W)``, 0 to 1."""
    heat = (slopes.mean(dim=(2, 3), keepdim=True) * maps).sum(dim=1).relu()
    heat = F.interpolate(heat[None], size, mode="bilinear")[0]
    low, high = heat.amin(dim=(1, 2), keepdim=True), heat.amax(dim=(1, 2), keepdim=True)
    return ((heat - low) / (high - low).clamp(min=1e-7)).numpy(force=True)


def _to_maps(model: MatryoshkaClassifier, output: Tensor, channels: int) -> Tensor:
    """Return a stage's output as ``(B, channels, h, w)``; timm also has tokens and channels-last outputs."""
    if output.ndim == 3:  # a transformer's tokens, class and register tokens first
        output = output[:, getattr(model.backbone, "num_prefix_tokens", 0) :]
        return output.unflatten(1, (math.isqrt(output.shape[1]), -1)).movedim(3, 1)
    return output if output.shape[1] == channels else output.movedim(3, 1)
