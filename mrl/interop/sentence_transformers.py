"""A model as a folder that sentence-transformers loads and feeds images to.

The folder names the class below, and sentence-transformers imports it: mrl must be installed where the folder is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mrl.data.folder import decode
from mrl.errors import UserError
from mrl.interop.hub import new_folder
from mrl.matryoshka import prefix, unit_prefix
from mrl.model import MatryoshkaClassifier, load, save_model

try:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import InputModule
except ImportError as error:
    raise UserError("this needs pip install 'sentence-transformers>=5.4'") from error


class MatryoshkaImages(InputModule):
    """Images in, embeddings ``(B, dim)`` out.

    sentence-transformers cuts to ``truncate_dim`` after the last module, and normalizes after that if ``encode`` is
    told to. So this module normalizes only if ``dim`` is given; a Normalize module would come before the cut.
    With None the embeddings are raw, up to the largest trained dim.
    """

    config_file_name = "matryoshka.json"
    config_keys = ["dim"]  # noqa: RUF012 (as the library declares it)
    modalities = ["image"]  # noqa: RUF012

    def __init__(self, model: MatryoshkaClassifier, dim: int | None = None):
        super().__init__()
        self.model = model
        self.dim = dim
        model.check_dim(dim)

    def get_embedding_dimension(self) -> int:
        return self.model.check_dim(self.dim)

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """Return one batch of PIL images, uint8 tensors, paths, or any of these as ``{"image": ...}``."""
        given = [item["image"] if isinstance(item, dict) else item for item in inputs]
        rule = self.model.info.exif_rotation
        images = [decode(str(item), rule) if isinstance(item, str | Path) else item for item in given]
        return {"images": torch.stack([self.model.preprocess(image) for image in images])}

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        cut = prefix if self.dim is None else unit_prefix
        features["sentence_embedding"] = cut(self.model.embed(features["images"]), self.get_embedding_dimension())
        return features

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        save_model(self.model, self.model.info, Path(output_path))
        self.save_config(output_path)

    @classmethod
    def load(cls, model_name_or_path: str, **kwargs: Any) -> MatryoshkaImages:  # type: ignore[override]
        where = {key: kwargs[key] for key in ("subfolder", "token", "cache_folder", "revision", "local_files_only")}
        config = cls.load_config(model_name_or_path, **where)
        return cls(load(cls.load_dir_path(model_name_or_path, **where)), **config)  # type: ignore[arg-type]


def export_sentence_transformer(run: str | Path, out: str | Path, dim: int | None = None) -> str:
    """Write a run or exported folder to the folder ``out``, and return the Python that loads it.

    ``dim`` fixes the length of the vectors and normalizes them; None leaves both to the library.
    """
    model = SentenceTransformer(modules=[MatryoshkaImages(load(run), dim)], device="cpu")
    new_folder(Path(out))
    model.save_pretrained(str(out), create_model_card=False)
    return f'SentenceTransformer("{out}", trust_remote_code=True)'
