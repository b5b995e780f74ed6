"""Nesting lists and prefixes: the idea of the paper (section 3).

An embedding ``z`` of width ``D`` is trained so that its first ``dim`` coordinates are an embedding
too, for every ``dim`` of the nesting list (the paper's M).
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from mrl.errors import UserError

SMALLEST_DIM = 8


def default_nesting_list(width: int) -> tuple[int, ...]:
    """Sizes from halving ``width`` while they stay whole and at least 8, ascending.

    >>> default_nesting_list(2048)
    (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
    >>> default_nesting_list(768)
    (12, 24, 48, 96, 192, 384, 768)
    """
    dims = [width]
    while dims[-1] % 2 == 0 and dims[-1] // 2 >= SMALLEST_DIM:
        dims.append(dims[-1] // 2)
    return tuple(reversed(dims))


def check_nesting_list(nesting_list: Sequence[int], width: int | None = None) -> tuple[int, ...]:
    """The nesting list as a tuple, once it is known to be possible.

    A single size below ``width`` is the fixed-feature baseline. A longer list that stops short of
    ``width`` leaves coordinates untrained, which is allowed but warned of.

    Raises:
        UserError: The list is empty, holds something other than positive whole numbers, is not
            strictly ascending, or holds a size above ``width``.
    """
    dims = tuple(nesting_list)
    shown = list(dims)
    if not dims:
        raise UserError("the nesting list is empty; give at least one prefix size, e.g. [8, 16, 32]")
    for dim in dims:
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
            raise UserError(f"the nesting list {shown} holds {dim!r}; prefix sizes are whole numbers above 0")
    if any(small >= large for small, large in itertools.pairwise(dims)):
        raise UserError(f"the nesting list {shown} must be strictly ascending, e.g. {sorted(set(dims))}")
    if width is not None and dims[-1] > width:
        raise UserError(f"the nesting list {shown} asks for {dims[-1]} dims, but the embedding has only {width}")
    if width is not None and len(dims) > 1 and dims[-1] < width:
        warnings.warn(
            f"the nesting list {shown} leaves coordinates {dims[-1]} to {width - 1} of the embedding untrained; "
            f"end it with {width} to train the full width",
            stacklevel=2,
        )
    return dims


def prefix(z: Tensor, dim: int) -> Tensor:
    """The first ``dim`` coordinates of ``z``: ``(..., D) -> (..., dim)``, a view, not normalised.

    Raises:
        UserError: ``dim`` is not between 1 and the width of ``z``.
    """
    if not 1 <= dim <= z.shape[-1]:
        raise UserError(
            f"cannot take {dim} dims of an embedding of width {z.shape[-1]}; allowed are 1 to {z.shape[-1]}"
        )
    return z[..., :dim]


def unit_prefix(z: Tensor, dim: int) -> Tensor:
    """The first ``dim`` coordinates, then scaled to length 1 in float32: ``(..., D) -> (..., dim)``.

    The order matters: a prefix of a normalised vector is not normalised, and its inner products
    are not cosines. Retrieval at any size goes through this one function.

    Raises:
        UserError: ``dim`` is not between 1 and the width of ``z``.
    """
    return F.normalize(prefix(z, dim).float(), dim=-1)
