"""The geometry of nested embeddings: where variance and classes are among the coordinates, and maps of prefixes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from mrl.errors import UserError
from mrl.nesting import unit_prefix
from mrl.studies.similarity import positive_pairs


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
    centred = np.asarray(vectors[:, : edges[-1]], dtype=np.float64)
    centred = centred - centred.mean(axis=0)
    variance = centred.var(axis=0)
    between = _class_means(centred, labels).var(axis=0)
    spans = list(itertools.pairwise(edges))
    return Blocks(
        dims=tuple(dims),
        variance=np.array([_ratio(variance[a:b].mean(), variance.mean()) for a, b in spans]),
        between=np.array([_ratio(between[a:b].sum(), variance[a:b].sum()) for a, b in spans]),
        rank=np.array([effective_rank(centred[:, a:b]) for a, b in spans]),
        prefix_rank=np.array([effective_rank(centred[:, :b]) for _, b in spans]),
    )


def effective_rank(centred: np.ndarray) -> float:
    """The exponential of the entropy of the normalised eigenvalues of the covariance (Roy and Vetterli, 2007).

    Between 1, all variance in one direction, and the number of columns, the same in all; 0 without variance.

    Args:
        centred: ``(N, d)``, columns of mean 0.
    """
    shares = np.linalg.svd(centred, compute_uv=False) ** 2
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


def _class_means(centred: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """``(N, D)``: each row's class mean."""
    _, index, counts = np.unique(labels, return_inverse=True, return_counts=True)
    sums = np.zeros((len(counts), centred.shape[1]))
    np.add.at(sums, index, centred)
    return (sums / counts[:, None])[index]


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0
