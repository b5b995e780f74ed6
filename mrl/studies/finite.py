"""The refusal of embeddings that hold NaN or infinity, whose scores would mean nothing."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mrl.errors import UserError

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
