"""A model as a folder that sentence-transformers loads and feeds images to.

This file is imported by sentence-transformers itself, which finds the class by the name that the folder
gives: mrl must be installed where the folder is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mrl.data.folder import read_image
from mrl.errors import UserError
from mrl.interop.hub import FILES, new_folder
from mrl.matryoshka import prefix, unit_prefix
from mrl.model import MatryoshkaClassifier, load, save_model

try:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import InputModule
except ImportError as error:
    raise UserError(
        "this export needs sentence-transformers 5.4 or newer: pip install 'sentence-transformers>=5.4'"
    ) from error


class MatryoshkaImages(InputModule):
    """Images in, embeddings ``(B, D)`` out, as sentence-transformers wants them.

    sentence-transformers cuts to ``truncate_dim`` after all modules, and normalizes after that only if
    ``encode`` is told to. So nothing is normalized here unless ``dim`` fixes the size: a Normalize in
    the module list would come before the cut.

    Args:
        model: What embeds, its ``info`` filled.
        dim: Prefix size, cut and normalized here; None for raw embeddings of full width.
    """

    config_file_name = "matryoshka.json"
    config_keys = ["dim"]  # noqa: RUF012 (as the library declares it)

    def __init__(self, model: MatryoshkaClassifier, dim: int | None = None):
        super().__init__()
        prefix(torch.empty(model.width), model.width if dim is None else dim)  # says which sizes there are
        self.model = model
        self.dim = dim

    @property
    def modalities(self) -> list[Any]:
        """What it takes: images only."""
        return ["image"]

    def get_embedding_dimension(self) -> int:
        """Length of the vectors that leave this module."""
        return self.model.width if self.dim is None else self.dim

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """The images as one batch: PIL images, uint8 tensors, paths, or any of these as ``{"image": ...}``."""
        given = [item["image"] if isinstance(item, dict) else item for item in inputs]
        images = [read_image(str(item)) if isinstance(item, str | Path) else item for item in given]
        return {"images": torch.stack([self.model.preprocess(image) for image in images])}

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """``features`` with ``sentence_embedding``, the embeddings."""
        z: Tensor = self.model.embed(features["images"])
        features["sentence_embedding"] = z if self.dim is None else unit_prefix(z, self.dim)
        return features

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Write the model and the size into a folder."""
        assert self.model.info is not None  # as __init__ asks
        save_model(self.model, self.model.info, Path(output_path))
        self.save_config(output_path)

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        init_defaults: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> MatryoshkaImages:
        """The module in a folder or Hub repository; the library says where to look."""
        where = (subfolder, token, cache_folder, revision, local_files_only)
        found = [cls.load_file_path(model_name_or_path, name, *where) for name in FILES]
        if None in found:
            raise UserError(f"{model_name_or_path} lacks one of {' and '.join(FILES)}; export it again")
        config = cls.load_config(model_name_or_path, subfolder, None, *where[1:])
        return cls(load(Path(str(found[0])).parent), **config)


def export_sentence_transformer(run: str | Path, out: str | Path, dim: int | None = None) -> str:
    """Python that loads it, after writing a folder for sentence-transformers to ``out``.

    Args:
        run: A finished run directory, or a folder that was exported for the Hub.
        out: A folder that is new, empty, or an earlier export (for the Hub too), which is replaced.
        dim: Prefix size that the folder is fixed to; None leaves it to ``truncate_dim``.

    Raises:
        UserError: The run is not finished, ``dim`` does not fit it, or ``out`` holds other files.
    """
    out = Path(out)
    model = SentenceTransformer(modules=[MatryoshkaImages(load(run), dim)], device="cpu")
    new_folder(out, earlier="model.json")
    model.save_pretrained(str(out), create_model_card=False)
    return f'SentenceTransformer("{out}", trust_remote_code=True)'
