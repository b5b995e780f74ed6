"""A model as an encoder of images for mteb's benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mrl.errors import UserError
from mrl.model import load
from mrl.retrieval.embeddings import file_sha256

try:
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ModelMeta, ScoringFunction
except ImportError as error:
    raise UserError("this needs pip install 'mteb>=2.26'") from error


class MatryoshkaEncoder(AbsEncoder):
    """Encode images for ``mteb.evaluate``: unit vectors of ``dim`` numbers, compared by cosine.

    mteb treats any SentenceTransformer object as a text model. This class says that it encodes images, so that mteb
    refuses text tasks before it starts.
    """

    def __init__(self, run: str | Path, dim: int | None = None, device: torch.device | str = "cpu") -> None:
        """Load a run directory or an exported folder.

        ``dim`` is the largest trained one when None.
        """
        self.model = load(run).to(device)
        self.device = device
        self.dim = self.model.check_dim(dim)
        about = {
            "name": f"local/{Path(run).resolve().name}",
            "revision": file_sha256(Path(run) / "model.safetensors")[:12],
            "modalities": ["image"],
            "embed_dim": self.dim,
            "experiment_kwargs": {"embed_dim": self.dim},  # keeps the results of each dim apart in mteb's cache
            "similarity_fn_name": ScoringFunction.COSINE,
            "n_parameters": sum(parameter.numel() for parameter in self.model.backbone.parameters()),
            "framework": ["PyTorch"],
        }
        self.mteb_model_meta = ModelMeta.create_empty(about)

    def encode(self, inputs: Any, **kwargs: Any) -> torch.Tensor:
        """Return the vectors ``(N, dim)`` of the images in mteb's batches, on the CPU."""
        batches = (torch.stack([self.model.preprocess(image) for image in batch["image"]]) for batch in inputs)
        return torch.cat([self.model.encode(batch.to(self.device), self.dim).cpu() for batch in batches])
