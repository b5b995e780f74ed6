"""torch.compile where it works."""

from __future__ import annotations

import copy
import sys

import torch

from mrl.distributed import Process
from mrl.model import MatryoshkaClassifier


def compile_or_stay_eager(
    model: MatryoshkaClassifier, micro_batch_size: int, px: int, autocast: torch.autocast, process: Process
) -> None:
    """Compile ``model`` in place if one step of a compiled copy works, at the first image size."""
    probe = copy.deepcopy(model)
    probe.compile()
    try:
        with autocast:
            images = torch.zeros(micro_batch_size, 3, px, px, device=process.device)
            logits = probe(images.contiguous(memory_format=torch.channels_last))
        logits.sum().backward()
    except Exception as error:
        if process.is_main:
            reason = str(error).strip().splitlines()[0]
            print(f"torch.compile failed, going on without it: {type(error).__name__}: {reason}", file=sys.stderr)
        return
    model.compile()
