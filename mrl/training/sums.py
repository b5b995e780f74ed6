"""Losses and correct answers per prefix, summed as they come and divided once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mrl.errors import UserError
from mrl.training.distributed import Process, sum_over_processes


class PrefixSums:
    """Running sums per prefix over the images that this process has seen.

    ``values`` is ``(3, G)`` float64 on ``device``: summed losses, correct answers, images. Nothing
    is read back from the device before `means` is called.
    """

    def __init__(self, dims: Sequence[int], device: torch.device):
        self.dims = tuple(dims)
        self.values = torch.zeros(3, len(self.dims), dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, logits: Tensor, labels: Tensor, losses: Tensor) -> None:
        """Count one batch: logits ``(G, B, C)``, labels ``(B,)``, mean losses ``(G,)``."""
        correct = (logits.argmax(-1) == labels).sum(1)
        count = torch.full_like(correct, len(labels))
        self.values += torch.stack([losses.double() * len(labels), correct.double(), count.double()])

    def means(self, loss_key: str, top_1_key: str) -> dict[str, float]:
        """``{loss_key/dim: mean loss, top_1_key/dim: share correct}`` over the images of all processes."""
        losses, correct, count = sum_over_processes(self.values).tolist()
        row = {f"{loss_key}/{dim}": losses[g] / count[g] for g, dim in enumerate(self.dims)}
        return row | {f"{top_1_key}/{dim}": correct[g] / count[g] for g, dim in enumerate(self.dims)}


class FiniteCheck:
    """Remembers on the device when the loss of a prefix was first not finite, so that no step waits for the answer."""

    def __init__(self, dims: Sequence[int], process: Process):
        self.dims = tuple(dims)
        self.process = process
        self.first_bad = torch.full((len(self.dims),), -1, device=process.device)

    @torch.no_grad()
    def add(self, losses: Tensor, step: int) -> None:
        """Look at the losses ``(G,)`` of one step."""
        self.first_bad = torch.where((self.first_bad < 0) & ~losses.isfinite(), step, self.first_bad)

    def refuse_non_finite(self) -> None:
        """Nothing, as long as all losses of all processes were finite.

        Raises:
            UserError: One was not; the message names the step and the prefixes.
        """
        table = self.first_bad.new_zeros(self.process.world_size, len(self.dims))
        table[self.process.rank] = self.first_bad + 1  # 0 is good, step + 1 is bad
        table = sum_over_processes(table)
        if not table.any():
            return
        step = int(table[table > 0].min()) - 1
        bad = [dim for g, dim in enumerate(self.dims) if (table[:, g] == step + 1).any()]
        raise UserError(
            f"the loss at step {step} is not finite for prefix sizes {bad}; what was saved before is kept. "
            "Lower --optim.lr or clip gradients with --optim.clip_norm 1; fp16 overflows where bf16 does not"
        )
