"""Cosine similarity of positive and of random pairs at every prefix size (paper, appendix E, table 6).

The geometry of nested embeddings: where variance and classes are among the coordinates, and maps of prefixes.

The same queries at growing prefix sizes: which neighbors come, and which queries show the most.

Where in an image the classifier of each prefix looks: Grad-CAM (Selvaraju et al., 2017), by the package grad-cam.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mrl.errors import UserError
from mrl.matryoshka import prefix, unit_prefix
from mrl.model import MatryoshkaClassifier
from mrl.results import Row, Source
from mrl.retrieval.search import Neighbors
from mrl.studies.classification import Classifier

STUDY = "similarity"
BATCH_PAIRS = 4096


def similarity(
    vectors: np.ndarray,
    labels: np.ndarray,
    dims: Sequence[int],
    source: Source,
    method: str,
    *,
    num_pairs: int = 10_000,
    seed: int = 0,
) -> list[Row]:
    """Rows of the mean cosine of pairs, -1 to 1, at each size: cosine_positive and cosine_random.

    A positive pair is two different images of one class, a random pair two different images of any.
    (The paper's positive pairs are an image and its caption.) The same pairs are taken at every size;
    ``n`` is their number. Where no class has two images there are no positive pairs and no such rows.

    Args:
        vectors: Embeddings ``(N, D)``, raw.
        labels: ``(N,)`` whole numbers.
        dims: Prefix sizes, each 1 to D.
        source: What the rows are of.
        method: The rows' method.
        num_pairs: How many pairs of each kind are drawn, with replacement.
        seed: Of the draw.

    Raises:
        UserError: The labels do not fit the embeddings, there are fewer than two images, a size is
            larger than the width, or an image of a pair has an embedding with NaN or infinity.
    """
    if len(vectors) < 2:
        raise UserError(f"{source.run}: a pair needs two images, but there is {len(vectors)}")
    rng = np.random.default_rng(seed)
    drawn = {
        "cosine_positive": positive_pairs(labels, num_pairs, rng),
        "cosine_random": positive_pairs(np.zeros_like(labels), num_pairs, rng),
    }
    return [
        source.row(STUDY, method, metric, value, len(pairs), dim=dim)
        for metric, pairs in drawn.items()
        if len(pairs)
        for dim, value in _mean_cosines(vectors, pairs, dims).items()
    ]


def positive_pairs(labels: np.ndarray, num_pairs: int, rng: np.random.Generator) -> np.ndarray:
    """Pairs ``(num_pairs, 2)`` of different rows with one label, drawn with replacement; ``(0, 2)`` if there are none.

    The first of a pair is any row that shares its label, each as likely; the second any other of its class.
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


def _mean_cosines(vectors: np.ndarray, pairs: np.ndarray, dims: Sequence[int]) -> dict[int, float]:
    sums = dict.fromkeys(dims, 0.0)
    for start in range(0, len(pairs), BATCH_PAIRS):
        some = pairs[start : start + BATCH_PAIRS]
        left, right = (torch.from_numpy(np.array(vectors[rows], dtype=np.float32)) for rows in some.T)
        for side, rows in zip((left, right), some.T, strict=True):
            broken = (~side.isfinite().all(dim=1)).nonzero()[:, 0]
            if len(broken):
                raise UserError(f"row {rows[broken[0]]} of the embeddings holds NaN or infinity, so it has no cosine")
        for dim in sums:
            cosines = (unit_prefix(left, dim).double() * unit_prefix(right, dim).double()).sum(dim=1)
            # Rounding alone can carry a cosine past 1, and a sum past the number of pairs.
            sums[dim] += cosines.clamp(-1, 1).sum().item()
    return {dim: min(1.0, max(-1.0, total / len(pairs))) for dim, total in sums.items()}


class Blocks(NamedTuple):
    """What each block of coordinates holds; block g is from the size before to ``dims[g]``.

    Attributes:
        dims: Ends of the blocks, G sizes, ascending.
        variance: Mean variance of a coordinate ``(G,)``, divided by that of all coordinates.
        between: The share ``(G,)`` of a block's variance that lies between class means, 0 to 1.
        rank: Effective rank ``(G,)`` of each block.
        prefix_rank: Effective rank ``(G,)`` of everything up to each size.
    """

    dims: tuple[int, ...]
    variance: np.ndarray
    between: np.ndarray
    rank: np.ndarray
    prefix_rank: np.ndarray


def blocks(vectors: np.ndarray, labels: np.ndarray, dims: Sequence[int]) -> Blocks:
    """`Blocks` of raw embeddings.

    Args:
        vectors: ``(N, D)``.
        labels: ``(N,)`` int64.
        dims: Ends of the blocks, ascending, each 1 to D.

    Raises:
        UserError: The sizes are not ascending and up to D, or there are fewer than two images.
    """
    edges = [0, *dims]
    if sorted(set(edges)) != edges or not dims or edges[-1] > vectors.shape[1]:
        raise UserError(f"sizes {list(dims)} must be ascending, each 1 to the width, {vectors.shape[1]}")
    if len(vectors) < 2:
        raise UserError(f"a variance needs two or more images, but there is {len(vectors)}")
    centered = np.asarray(vectors[:, : edges[-1]], dtype=np.float64)
    centered = centered - centered.mean(axis=0)
    variance = centered.var(axis=0)
    between = _class_means(centered, labels).var(axis=0)
    spans = list(itertools.pairwise(edges))
    return Blocks(
        dims=tuple(dims),
        variance=np.array([_ratio(variance[a:b].mean(), variance.mean()) for a, b in spans]),
        between=np.array([_ratio(between[a:b].sum(), variance[a:b].sum()) for a, b in spans]),
        rank=np.array([effective_rank(centered[:, a:b]) for a, b in spans]),
        prefix_rank=np.array([effective_rank(centered[:, :b]) for _, b in spans]),
    )


def effective_rank(centered: np.ndarray) -> float:
    """The exponential of the entropy of the normalized eigenvalues of the covariance (Roy and Vetterli, 2007).

    Between 1, all variance in one direction, and the number of columns, the same in all; 0 without variance.

    Args:
        centered: ``(N, d)``, columns of mean 0.
    """
    shares = np.linalg.svd(centered, compute_uv=False) ** 2
    if shares.sum() == 0:
        return 0.0
    shares = shares / shares.sum()
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def spread_rows(num_rows: int, most: int) -> np.ndarray:
    """Up to ``most`` rows of ``num_rows``, evenly spread from first to last."""
    return np.linspace(0, num_rows - 1, min(most, num_rows)).round().astype(np.int64)


def maps(vectors: np.ndarray, dims: Sequence[int], seed: int = 0) -> dict[int, np.ndarray]:
    """``{dim: (N, 2)}``: a t-SNE map of the unit prefixes of each size.

    Raises:
        UserError: There are fewer than 10 images, or a size does not fit the embeddings.
    """
    if len(vectors) < 10:
        raise UserError(f"a map needs 10 or more images, but there are {len(vectors)}")
    from sklearn.manifold import TSNE

    z = torch.from_numpy(np.array(vectors, dtype=np.float32))
    perplexity = min(30.0, (len(z) - 1) / 3)
    settings = {"perplexity": perplexity, "init": "random", "random_state": seed}
    return {dim: TSNE(**settings).fit_transform(unit_prefix(z, dim).numpy()) for dim in dims}


def cosines(
    vectors: np.ndarray, labels: np.ndarray, dims: Sequence[int], num_pairs: int = 5000, seed: int = 0
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """``{dim: (cosines of pairs of one class, cosines of random pairs)}``, the same pairs at every size.

    Args:
        vectors: Embeddings ``(N, D)``, raw.
        labels: ``(N,)`` int64.
        dims: Sizes, each 1 to D.
        num_pairs: How many pairs of each kind are drawn; none of one class where no class has two images.
        seed: Of the draw.
    """
    rng = np.random.default_rng(seed)
    kinds = [positive_pairs(labels, num_pairs, rng), positive_pairs(np.zeros_like(labels), num_pairs, rng)]
    z = torch.from_numpy(np.array(vectors, dtype=np.float32))
    found = {}
    for dim in dims:
        unit = unit_prefix(z, dim)
        of_class, random = ((unit[pairs[:, 0]] * unit[pairs[:, 1]]).sum(dim=1).numpy() for pairs in kinds)
        found[dim] = (of_class, random)
    return found


def _class_means(centered: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """``(N, D)``: each row's class mean."""
    _, index, counts = np.unique(labels, return_inverse=True, return_counts=True)
    sums = np.zeros((len(counts), centered.shape[1]))
    np.add.at(sums, index, centered)
    return (sums / counts[:, None])[index]


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0


NUM_SHOWN = 4


def shown_sizes(dims: Sequence[int]) -> list[int]:
    """Up to four of ``dims`` for a picture: the smallest, every second after it, and the largest.

    >>> shown_sizes([8, 16, 32, 64, 128, 256, 512, 1024, 2048])
    [8, 32, 128, 2048]
    """
    return sorted({*dims[:-1:2][: NUM_SHOWN - 1], dims[-1]})


def telling_queries(
    found: Mapping[int, Neighbors], query_labels: np.ndarray, database_labels: np.ndarray, num_queries: int
) -> np.ndarray:
    """Rows ``(num_queries,)`` of the queries whose neighbors get better most from the smallest size to the largest.

    Of each class at most one, as long as there are classes left; equal gains by lower row. These are picked to be
    seen, not to be representative.

    Args:
        found: ``{dim: (indices, scores)}`` of `mrl.exact_search`, for all images or for those that
            `mrl.studies.retrieval.thin_indices` takes; what is returned are rows of these queries.
        query_labels: ``(Q,)`` int64, of the same.
        database_labels: ``(N,)`` int64.
        num_queries: 1 to Q.

    Raises:
        UserError: There are not so many queries.
    """
    if not 1 <= num_queries <= len(query_labels):
        raise UserError(f"{num_queries} queries were asked for; allowed are 1 to {len(query_labels)}")
    right = {dim: (database_labels[rows] == query_labels[:, None]).sum(axis=1) for dim, (rows, _) in found.items()}
    order = np.argsort(right[min(right)] - right[max(right)], kind="stable")
    _, firsts = np.unique(query_labels[order], return_index=True)
    best_of_class = np.sort(firsts)
    others = np.setdiff1d(np.arange(len(order)), best_of_class)
    return order[np.concatenate([best_of_class, others])[:num_queries]]


def undecided_images(predictions: np.ndarray, labels: np.ndarray, num_images: int) -> np.ndarray:
    """Rows ``(num_images,)`` of the images whose predicted class changes most often with size and ends up right.

    Args:
        predictions: Classes ``(G, N)`` int64, smallest size first.
        labels: ``(N,)`` int64.
        num_images: 1 to N.

    Raises:
        UserError: There are not so many images.
    """
    if not 1 <= num_images <= len(labels):
        raise UserError(f"{num_images} images were asked for; allowed are 1 to {len(labels)}")
    changes = (np.diff(predictions, axis=0) != 0).sum(axis=0)
    return np.lexsort((-changes, predictions[-1] != labels))[:num_images]


SMALLEST_MAP = 4


def grad_cams(
    model: MatryoshkaClassifier,
    images: Tensor,
    classifiers: Sequence[Classifier],
    targets: np.ndarray,
    layer: str | None = None,
) -> np.ndarray:
    """Heat ``(G, B, H, W)``, 0 to 1 within each image: what speaks for the target class, at each size.

    The score that is differentiated is the logit of each prefix's own classifier, so the maps of one image
    differ in nothing but the size.

    Args:
        model: In eval mode.
        images: ``(B, 3, H, W)``, normalized, on the model's device.
        classifiers: Weight ``(C, dim)`` and bias ``(C,)`` of G sizes.
        targets: ``(G, B)`` int64: the class that is asked about, e.g. the predicted one.
        layer: Module of the backbone whose output is weighed; `default_layer` when None.

    Raises:
        UserError: grad-cam is not installed, or the backbone has no such layer.
    """
    try:
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    except ImportError as error:
        raise UserError("Grad-CAM needs the package grad-cam: pip install grad-cam") from error
    name = default_layer(model, images.shape[-1]) if layer is None else layer
    try:
        module = model.backbone.get_submodule(name)
    except AttributeError as error:
        raise UserError(f"the backbone has no layer {name!r}; those with maps are {list(_stages(model))}") from error
    to_maps = _MapsFirst(_stages(model).get(name), getattr(model.backbone, "num_prefix_tokens", 0))
    maps = []
    for classifier, of_size in zip(classifiers, targets, strict=True):
        with GradCAM(_OneSize(model, classifier), [module], reshape_transform=to_maps) as cam:
            maps.append(cam(images, [ClassifierOutputTarget(int(target)) for target in of_size]))
    return np.stack(maps)


def default_layer(model: MatryoshkaClassifier, px: int) -> str:
    """The last stage of the backbone whose maps are at least 4 x 4 for images of ``px`` pixels.

    Small images leave the very last stage a single cell, which can show nothing.

    Raises:
        UserError: timm does not say where the backbone's stages are, or none has maps as large.
    """
    weight = next(model.parameters())
    sides: dict[str, float] = {}
    hooks = [
        model.backbone.get_submodule(name).register_forward_hook(
            lambda _, __, output, name=name, channels=channels: sides.update({name: _side(output, channels)})
        )
        for name, channels in _stages(model).items()
    ]
    with torch.no_grad():
        model.embed(torch.zeros(1, 3, px, px, device=weight.device, dtype=weight.dtype))
    for hook in hooks:
        hook.remove()
    large = [name for name, side in sides.items() if side >= SMALLEST_MAP]
    if not large:
        raise UserError(
            f"no stage of this backbone has maps of {SMALLEST_MAP} x {SMALLEST_MAP} or more for images of {px} px "
            f"({sides}); name a layer"
        )
    return large[-1]


class _OneSize(nn.Module):
    """Logits ``(B, C)`` of one prefix, down to the images."""

    def __init__(self, model: MatryoshkaClassifier, classifier: Classifier):
        super().__init__()
        self.model = model
        self.weight, self.bias = (part.detach() for part in classifier)

    def forward(self, images: Tensor) -> Tensor:
        return F.linear(prefix(self.model.embed(images), self.weight.shape[1]), self.weight, self.bias)


class _MapsFirst:
    """A layer's output as ``(B, channels, height, width)``, from timm's other two shapes of it too."""

    def __init__(self, channels: int | None, num_prefix_tokens: int):
        self.channels = channels
        self.num_prefix_tokens = num_prefix_tokens

    def __call__(self, output: Tensor) -> Tensor:
        if output.ndim == 3:  # tokens of a transformer, in rows, after class and register tokens
            output = output[:, self.num_prefix_tokens :]
            side = math.isqrt(output.shape[1])
            return output.unflatten(1, (side, -1)).permute(0, 3, 1, 2)
        if output.shape[1] != self.channels and output.shape[-1] == self.channels:
            return output.permute(0, 3, 1, 2)
        return output


def _stages(model: MatryoshkaClassifier) -> dict[str, int]:
    """``{module: channels}`` of the backbone's stages, in order, as timm lists them."""
    info: Any = getattr(model.backbone, "feature_info", None)
    if not info:
        raise UserError("timm does not list the stages of this backbone, so Grad-CAM has no layer to look at")
    return {stage["module"]: stage["num_chs"] for stage in info}


def _side(output: Tensor, channels: int) -> float:
    """Side of the map in a layer's output, in cells; the shorter one of a map that is not square."""
    if output.ndim == 3:
        return math.sqrt(output.shape[1])
    return min(output.shape[2:] if output.shape[1] == channels else output.shape[1:3])
