"""The checkpoints of the paper's authors (github.com/RAIVNLab/MRL), read as models and as run directories.

    python -m mrl.interop.authors r50_mrl1_e0_ff2048.pt --data.root DIR      # fills runs/r50_mrl1_e0_ff2048
    python eval.py --runs runs/r50_mrl1_e0_ff2048

DIR holds ImageNet as train/<wnid>/ and val/<wnid>/. Any other setting of the sections run, data and head may
follow, e.g. --run.name or --data.num_workers. A file that says too little about itself needs one more word:
--head.nesting_list '[2048]' for FF-2048, --head.tied true for MRL-E.
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
from torch import Tensor, nn

from mrl.config import Config, DataConfig, parse_command_line, to_yaml
from mrl.errors import UserError
from mrl.matryoshka import default_nesting_list
from mrl.model import BlurConv2d, MatryoshkaClassifier, ModelInfo, build_backbone, build_model, check_fits, save_model
from mrl.retrieval.embeddings import file_sha256
from mrl.rundir import atomic_write_text, provenance

BACKBONE, WIDTH = "resnet50", 2048
DATA_PARALLEL = "module."
BLUR = ".blur_filter"
FREE_SETTINGS = ("--run.", "--data.", "--head.")


def load_checkpoint(
    path: str | Path, nesting_list: Sequence[int] | None = None, tied: bool | None = None
) -> MatryoshkaClassifier:
    """The model in a file of the authors, in eval mode on the CPU, its ``info`` filled.

    Their files are state dicts of torchvision's ResNet-50 (whose names are timm's too), and differ from ours in
    four ways, all read from the names and shapes in the file:

    - every name may begin with ``module.``;
    - six strided convolutions may be wrapped for BlurPool: ``layer2.0.conv2.conv.weight`` is the weight of
      ``layer2.0.conv2``, and ``layer2.0.conv2.blur_filter`` the blur, a constant that is checked and left out;
    - ``fc.nesting_classifier_0.weight`` ``(1000, 8)`` to ``fc.nesting_classifier_8.weight`` ``(1000, 2048)`` are the
      classifiers of MRL; if there is only the 0th, and it is 2048 wide, the model is MRL-E;
    - ``fc.weight`` ``(1000, d)`` is FF-d. Of 2048 columns it is FF-2048 or, in their older naming, MRL-E, which the
      file cannot say: then ``_e0_`` or ``_e1_`` in its name decides, as in the names that they published.

    Beside the six blurs no entry may be left over, and none may be missing.

    Args:
        path: Their file.
        nesting_list: Sizes that MRL-E was trained at, which its file does not hold; 8, 16, ..., 2048 when None.
            ``[2048]`` says that the file is FF-2048.
        tied: True says that the file is MRL-E, False that it is not.

    Raises:
        UserError: The file cannot be read, holds anything else, or leaves open which model it is.
    """
    path = Path(path)
    try:
        state = _read(path)
        head, dims, is_tied = _read_head(state, path.name, nesting_list, tied)
        blurpool = any(key.endswith(BLUR) for key in state)
        model = build_model(build_backbone(BACKBONE, blurpool=blurpool), len(class_names()), dims, is_tied)
        backbone = _read_backbone(state, model.backbone)
        check_fits(backbone, model.backbone.state_dict(), f"beside the classifier it is not a {BACKBONE}")
    except UserError as error:
        raise UserError(f"{path} cannot be taken for a checkpoint of the paper's authors: {error}") from error
    model.backbone.load_state_dict(backbone)
    model.head.load_state_dict(head)
    data = DataConfig()
    model.info = ModelInfo(
        backbone=BACKBONE,
        kwargs={},
        stem_stride=4,
        blurpool=blurpool,
        nesting_list=dims,
        tied=is_tied,
        classes=class_names(),
        resize_px=data.eval_resize_px,
        crop_px=data.eval_px,
        mean=data.mean,
        std=data.std,
    )
    return model.eval()


def class_names() -> tuple[str, ...]:
    """The 1,000 WordNet ids of ImageNet-1K, sorted: the order of the authors' classifiers."""
    return tuple(sorted(ImageNetInfo().label_names()))


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors in a file by name, without a common ``module.``."""
    if not path.is_file():
        raise UserError("there is no such file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds on bad data
        raise UserError(f"torch.load refuses it ({str(error).splitlines()[0]})") from error
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"it holds a {type(state).__name__} that is not a state dict, names with a tensor each")
    prefixed = [key for key in state if key.startswith(DATA_PARALLEL)]
    if len(prefixed) not in (0, len(state)):
        raise UserError(f"{len(prefixed)} of {len(state)} names begin with {DATA_PARALLEL}; allowed: all or none")
    return {key.removeprefix(DATA_PARALLEL): value for key, value in state.items()}


def _read_backbone(state: Mapping[str, Tensor], backbone: nn.Module) -> dict[str, Tensor]:
    """All but the classifier under the names of ``backbone``, BlurPool's wrappers taken off.

    Raises:
        UserError: A blur is another than [1,2,1]x[1,2,1]/16, or stands elsewhere than in the authors' models.
    """
    blurs = {key.removesuffix(BLUR): value for key, value in state.items() if key.endswith(BLUR)}
    expected = {name: module.blur for name, module in backbone.named_modules() if isinstance(module, BlurConv2d)}
    if blurs.keys() != expected.keys():
        raise UserError(f"it blurs before {sorted(blurs)}; allowed: nowhere, or before {sorted(expected)}")
    for name, blur in blurs.items():
        if blur.shape != expected[name].shape or not torch.equal(blur.float(), expected[name]):
            raise UserError(f"{name}{BLUR} is not [1,2,1]x[1,2,1]/16 for each of its channels")
    renamed = {f"{name}.conv.weight": f"{name}.weight" for name in blurs}
    left_out = ("fc.", *(f"{name}{BLUR}" for name in blurs))
    return {renamed.get(key, key): value for key, value in state.items() if not key.startswith(left_out)}


def _read_head(
    state: Mapping[str, Tensor], file_name: str, nesting_list: Sequence[int] | None, tied: bool | None
) -> tuple[dict[str, Tensor], tuple[int, ...], bool]:
    """The classifiers under our names, their nesting list, and whether they are MRL-E's one."""
    given = {key.removeprefix("fc."): value for key, value in state.items() if key.startswith("fc.")}
    plain = "weight" in given
    stems = [""] if plain else [f"nesting_classifier_{g}." for g in range(len(given) // 2)]
    parts = ("weight", "bias")
    if not stems or given.keys() != {f"{stem}{part}" for stem in stems for part in parts}:
        raise UserError(
            f"its classifier holds {sorted(given) or 'nothing'} below fc.; allowed: weight and bias, or those of "
            "nesting_classifier_0, nesting_classifier_1, ..."
        )
    num_classes = len(class_names())
    for stem in stems:
        weight, bias = (given[f"{stem}{part}"] for part in parts)
        if weight.ndim != 2 or weight.shape[0] != num_classes or bias.shape != (num_classes,):
            shapes = f"{tuple(weight.shape)} and {tuple(bias.shape)}"
            raise UserError(f"below fc.{stem} are shapes {shapes}; allowed: ({num_classes}, d) and ({num_classes},)")
    head = {f"classifiers.{g}.{part}": given[f"{stem}{part}"] for g, stem in enumerate(stems) for part in parts}
    dims = tuple(int(given[f"{stem}weight"].shape[1]) for stem in stems)
    is_tied = dims == (WIDTH,) and (not plain or _is_old_mrl_e(file_name, nesting_list, tied))
    if is_tied:
        dims = default_nesting_list(WIDTH) if nesting_list is None else tuple(nesting_list)
    if tied not in (None, is_tied) or (nesting_list is not None and tuple(nesting_list) != dims):
        said = {"nesting_list": nesting_list and list(nesting_list), "tied": tied}
        raise UserError(f"it was said to be of {said}, but holds nesting_list {list(dims)}, tied {is_tied}")
    return head, dims, is_tied


def _is_old_mrl_e(file_name: str, nesting_list: Sequence[int] | None, tied: bool | None) -> bool:
    """Whether ``fc.weight`` of full width is MRL-E's: as was said, or else as the published names say."""
    if tied is not None:
        return tied
    if nesting_list is not None:
        return len(nesting_list) > 1
    published = re.search(r"_e([01])_", file_name)
    if published is None:
        raise UserError(
            f"its fc.weight of {WIDTH} columns is FF-{WIDTH} or MRL-E, and its name does not say which (_e0_ or _e1_); "
            f"say so to mrl.interop.authors.load_checkpoint, nesting_list=[{WIDTH}] or tied=True "
            f"(on the command line --head.nesting_list '[{WIDTH}]' or --head.tied true)"
        )
    return published[1] == "1"


def import_checkpoint(words: Sequence[str], write: bool = True) -> Path:
    """The run directory of a file of the authors, written unless it is another process's part to do so.

    Its config.yaml holds this repository's defaults where the file says nothing, so also in how it was trained. A
    directory that came of the same file is written again, which changes no embeddings.

    Args:
        words: The file, then settings as on this module's command line.
        write: False for all but one of several processes.

    Raises:
        UserError: As `load_checkpoint`; a setting is unknown or not free; or the directory holds something else.
    """
    if not words or words[0].startswith("-"):
        raise UserError("give the authors' file first, then settings such as --data.root DIR")
    path = Path(words[0])
    for word in words[1:]:
        if word.startswith("--") and not word.startswith(FREE_SETTINGS):
            raise UserError(
                f"{word} cannot be set for a finished checkpoint; allowed: {'..., '.join(FREE_SETTINGS)}..."
            )
    config = parse_command_line(["--run.name", path.stem, *words[1:]], str(__doc__))
    if config.data.root is None:
        raise UserError("data.root is not given; it is the folder that holds ImageNet's train/ and val/")
    dims = None if config.head.nesting_list == "auto" else config.head.nesting_list
    model = load_checkpoint(path, dims, config.head.tied or None)
    directory = Path(config.run.dir) / config.run.name
    if write:
        _write_run(directory, config, model, path)
    return directory


def _write_run(directory: Path, config: Config, model: MatryoshkaClassifier, source: Path) -> None:
    record, sha256 = directory / "provenance.json", file_sha256(source)
    if directory.exists() and any(directory.iterdir()) and not (record.is_file() and sha256 in record.read_text()):
        raise UserError(f"{directory} holds something else than the import of {source}; choose another --run.name")
    info: ModelInfo = model.info  # type: ignore[assignment]
    data = config.data
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, backbone=info.backbone, blurpool=info.blurpool),
        head=dataclasses.replace(config.head, nesting_list=list(info.nesting_list), tied=info.tied),
    )
    info = dataclasses.replace(info, resize_px=data.eval_resize_px, crop_px=data.eval_px, mean=data.mean, std=data.std)
    directory.mkdir(parents=True, exist_ok=True)
    # First, so that a directory left half-written is known for what it is and written again.
    entry = {"imported_from": str(source), "imported_sha256": sha256, "command": sys.argv, **provenance()}
    atomic_write_text(record, json.dumps([entry], indent=2) + "\n")
    said = f"# Imported from {source.name}, which does not say how it was trained: optim and train are mere defaults.\n"
    atomic_write_text(directory / "config.yaml", said + to_yaml(config))
    save_model(model, info, directory)


def main(argv: list[str] | None = None) -> int:
    """Import a checkpoint from a command line; returns the exit status."""
    words = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    try:
        directory = import_checkpoint(words)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{directory}: imported. Next: python eval.py --runs {directory}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
