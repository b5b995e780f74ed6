"""Images without labels, as a model's evaluation sees them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mrl.data.crops import Transform
from mrl.data.folder import FolderImages
from mrl.models import ModelInfo


def evaluated_images(paths: Sequence[str], info: ModelInfo, device: torch.device, num_workers: int) -> FolderImages:
    """Image files, resized, cut and normalised as ``info`` says; their labels are 0 and mean nothing."""
    transform = Transform(0, (1, 1), (1, 1), False, info.resize_px, info.crop_px, info.mean, info.std)
    return FolderImages(paths, torch.zeros(len(paths), dtype=torch.int64), [], transform, device, num_workers)
