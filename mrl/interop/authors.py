"""Checkpoints of the paper's authors (github.com/RAIVNLab/MRL), as models and as run directories.

    python eval.py --checkpoint r50_mrl1_e0_ff2048.pt --data.root DIR      # fills runs/r50_mrl1_e0_ff2048

DIR holds ImageNet as train/<wnid>/ and val/<wnid>/. Settings of the sections run, data and head may follow, e.g.
--run.name or --data.num_workers. If neither the file nor its name tells FF-2048 from MRL-E, add
--head.nesting_list '[2048]' for FF-2048 or --head.tied true for MRL-E.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from timm.data import ImageNetInfo
from torch import Tensor

from mrl.config import DataConfig, parse_command_line, to_yaml
from mrl.errors import UserError
from mrl.matryoshka import default_nesting_list
from mrl.model import BlurConv2d, MatryoshkaClassifier, ModelInfo, build_backbone, build_model, check_state, save_model
from mrl.retrieval.embeddings import file_sha256
from mrl.rundir import atomic_write_text, provenance

BLUR = ".blur_filter"
SETTINGS = ("--run.", "--data.", "--head.")


def class_names() -> tuple[str, ...]:
    """Return the 1,000 WordNet ids of ImageNet-1K, sorted, which is the order of the authors' classifiers."""
    return tuple(sorted(ImageNetInfo().label_names()))


def load_checkpoint(
    path: str | Path,
    nesting_list: Sequence[int] | None = None,
    tied: bool | None = None,
    data: DataConfig | None = None,
) -> MatryoshkaClassifier:
    """Return the model in a file of the authors, in eval mode on the CPU, with its ``info``.

    The files are state dicts of torchvision's ResNet-50, except that:

    - Names may begin with ``module.``.
    - BlurPool wraps six strided convolutions, e.g. ``layer2.0.conv2.conv.weight`` and ``layer2.0.conv2.blur_filter``.
    - ``fc.nesting_classifier_0.weight`` ``(1000, 8)`` and its successors are MRL's heads; a single one is MRL-E's.
    - ``fc.weight`` ``(1000, d)`` is FF-d's. With d = 2048 it may be MRL-E's in an older naming, if the name has _e1_.

    Args:
        nesting_list: Trained dims. MRL-E's file does not hold them: None for 8, 16, ..., 2048. [2048] for FF-2048.
        tied: Whether the file is MRL-E, if that is known.
        data: Image size and normalization; None for the paper's.

    Raises:
        UserError: The file cannot be read, is not such a checkpoint, or may be several models.
    """
    path, data = Path(path), data or DataConfig()
    try:
        state = _read(path)
        given = None if nesting_list is None else tuple(nesting_list)
        dims, is_tied = _nesting_list(state, path.name, given, tied)
        blurpool = any(key.endswith(BLUR) for key in state)
        model = build_model(build_backbone("resnet50", blurpool=blurpool), len(class_names()), dims, is_tied)
        blurs = {f"{name}{BLUR}": conv.blur for name, conv in model.named_modules() if isinstance(conv, BlurConv2d)}
        state = {_our_name(key, blurpool): value for key, value in state.items()}
        check_state(state, model.state_dict() | blurs, "it is not a ResNet-50 with a nested head")
        for name, blur in blurs.items():
            if not torch.equal(state.pop(name).float(), blur):
                raise UserError(f"{name} is not [1,2,1]x[1,2,1]/16 for each of its channels")
    except UserError as error:
        raise UserError(f"{path} cannot be read as a checkpoint of the paper's authors: {error}") from error
    model.load_state_dict(state)
    images = data.eval_resize_px, data.eval_px, data.mean, data.std
    model.info = ModelInfo("resnet50", {}, 4, blurpool, dims, is_tied, class_names(), *images)
    return model.eval()


def _read(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds on bad data
        raise UserError(f"torch.load refuses it ({str(error).splitlines()[0]})") from error
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"it holds a {type(state).__name__} that is not a state dict")
    return {key.removeprefix("module."): value for key, value in state.items()}


def _our_name(key: str, blurpool: bool) -> str:
    if key.startswith("fc."):
        return re.sub(r"^fc\.(?:nesting_classifier_(\d+)\.)?", lambda found: f"head.classifiers.{found[1] or 0}.", key)
    return "backbone." + (key.replace(".conv.", ".") if blurpool else key)


def _nesting_list(
    state: Mapping[str, Tensor], file_name: str, given: tuple[int, ...] | None, tied: bool | None
) -> tuple[tuple[int, ...], bool]:
    """Return the trained dims, and whether the model is MRL-E."""
    dims = tuple(state[key].shape[-1] for key in state if re.fullmatch(r"fc\.(nesting_classifier_\d+\.)?weight", key))
    if not dims:
        raise UserError("it has no classifier: neither fc.weight nor fc.nesting_classifier_0.weight")
    is_tied = dims == (2048,)
    if is_tied and "fc.weight" in state:  # FF-2048 or MRL-E in the older naming
        published = re.search("_e([01])_", file_name)
        if tied is None and given is None and not published:
            raise UserError(
                "it is FF-2048 or MRL-E, and its name does not tell which (_e0_ or _e1_); give --head.nesting_list "
                "'[2048]' or --head.tied true (in Python nesting_list=[2048] or tied=True to load_checkpoint)"
            )
        guessed = len(given) > 1 if given else bool(published and published[1] == "1")
        is_tied = guessed if tied is None else tied
    if is_tied:
        dims = given or default_nesting_list(2048)
    if tied not in (None, is_tied) or given not in (None, dims):
        raise UserError(f"it has nesting_list {list(dims)}, tied {is_tied}; given were {given}, {tied}")
    return dims, is_tied


def import_checkpoint(argv: Sequence[str], write: bool = True) -> Path:
    """Write the run directory of a file of the authors, and return it.

    Importing the same file again replaces the directory's files but keeps its embeddings.

    Args:
        argv: The file, then settings, as after ``eval.py --checkpoint``.
        write: False on all but one of several processes.

    Raises:
        UserError: The file is not a checkpoint, a setting is not allowed, or the directory holds something else.
    """
    path = Path(argv[0])
    for option in argv[1:]:
        if option.startswith("--") and not option.startswith(SETTINGS):
            raise UserError(f"{option} cannot be set for a trained checkpoint; allowed: {'..., '.join(SETTINGS)}...")
    config = parse_command_line(["--run.name", path.stem, *argv[1:]], str(__doc__))
    data, head = config.data, config.head
    if data.root is None:
        raise UserError("data.root is not given; it is the folder that holds ImageNet's train/ and val/")
    model = load_checkpoint(path, None if head.nesting_list == "auto" else head.nesting_list, head.tied or None, data)
    directory = Path(config.run.dir) / config.run.name
    if not write:
        return directory
    record, sha256 = directory / "provenance.json", file_sha256(path)
    if directory.exists() and any(directory.iterdir()) and not (record.is_file() and sha256 in record.read_text()):
        raise UserError(f"{directory} does not hold an import of {path}; choose another --run.name")
    info = model.info
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, backbone=info.backbone, blurpool=info.blurpool),
        head=dataclasses.replace(head, nesting_list=list(info.nesting_list), tied=info.tied),
    )
    directory.mkdir(parents=True, exist_ok=True)
    # The record comes first, so that a half-written directory is recognized and written again.
    entry = {"imported_from": str(path), "imported_sha256": sha256, "command": sys.argv, **provenance()}
    atomic_write_text(record, json.dumps([entry], indent=2) + "\n")
    note = f"# Imported from {path.name}, which does not tell how it was trained: optim and train hold defaults.\n"
    atomic_write_text(directory / "config.yaml", note + to_yaml(config))
    save_model(model, info, directory)
    return directory
