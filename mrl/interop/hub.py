"""The model card (README.md of a Hub repository) of a run, written from what the run directory holds.

A model as a folder that the Hugging Face Hub takes: weights, description, model card.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import EvalResult, ModelCardData

from mrl.config import Config, read_config
from mrl.errors import UserError
from mrl.model import MatryoshkaClassifier, ModelInfo, load, save_model
from mrl.results import Row, method_name, read_rows
from mrl.rundir import atomic_write_text
from mrl.studies.run import dataset_name

PAPER = "https://arxiv.org/abs/2205.13147"


class Accuracies(NamedTuple):
    """``{dim: value in [0, 1]}`` by name of metric, and where the numbers are from."""

    by_metric: dict[str, dict[int, float]]
    source: str


def model_card(run: Path, license: str, results: Path | None = None) -> str:
    """The text of the card: sizes and their accuracy, use, normalization, training data, license.

    Args:
        run: A finished run directory.
        license: Of the weights, as the Hub spells it: mit, cc-by-nc-4.0, other, ...
        results: Rows of eval.py that hold this run; the last validation of the training when None.

    Raises:
        UserError: The run is not finished, or ``results`` holds no accuracy of it.
    """
    config, info = read_config(run / "config.yaml"), load(run).info
    assert info is not None  # load fills it
    name = config.run.name
    method = method_name(info.nesting_list, info.tied)
    dataset = dataset_name(config, len(info.classes))
    found = _from_rows(read_rows(results), name, method, dataset, results) if results else _from_metrics(run)
    top_1 = found.by_metric["top_1"]
    metadata = ModelCardData(
        license=license,
        tags=["matryoshka", "image-feature-extraction"],
        pipeline_tag="image-feature-extraction",
        model_name=name,
        eval_results=[
            EvalResult("image-classification", dataset, dataset, "accuracy", value, metric_name=f"top-1 at {dim} dims")
            for dim, value in sorted(top_1.items())
        ],
    )
    sizes = _words(info.nesting_list)
    example_dim = info.nesting_list[max(0, len(info.nesting_list) // 2 - 1)]
    return f"""---
{metadata.to_yaml()}
---

# {name}

An image embedding ({info.backbone}, {method}, trained on {dataset}) whose prefixes of {sizes} numbers are
embeddings of that size: cut the vector to the size that you can afford, then normalize it. The method is
[Matryoshka Representation Learning]({PAPER}).

## Size and accuracy

{_table(found.by_metric)}

Percent of the validation images of {dataset}; "of full" is the share of the accuracy at {max(top_1)} dims.
Bytes are those of a float32 vector. Numbers from {found.source}.

## Use

```python
import torch
from PIL import Image

import mrl

model = mrl.load("DIR")  # this folder, or its id on the Hub
images = torch.stack([model.preprocess(Image.open(path)) for path in paths])
vectors = model.encode(images, dim={example_dim})  # (B, {example_dim}), length 1
```

**Normalization.** Take the first `dim` numbers of the raw embedding, *then* scale them to length 1; compare by inner
product. A prefix of a vector that was normalized before is not normalized: scale it again after every cut.

**Images.** Shorter side resized to {info.resize_px} px, center {info.crop_px} x {info.crop_px} px, RGB from 0 to 1,
then minus {_numbers(info.mean)} and divided by {_numbers(info.std)}.

## Training

{_training(config, info, dataset)}

## License of the weights

`{license}`. What the training images allow is for their publishers to say; their terms may also bind the weights.
"""


def _from_rows(rows: Sequence[Row], run: str, method: str, dataset: str, path: Path) -> Accuracies:
    # A run has rows of baselines and of other data sets too, under the same studies and metrics.
    wanted = (run, method, dataset)
    names = {("classification", "top_1"): "top_1", ("retrieval", "top_1"): "1-NN", ("retrieval", "map@10"): "mAP@10"}
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if (row.run, row.method, row.dataset) == wanted and row.dim is not None and (row.study, row.metric) in names:
            found.setdefault(names[row.study, row.metric], {})[row.dim] = row.value
    if "top_1" not in found:
        raise UserError(
            f"{path} holds no top-1 of the run {run!r} ({method}) on {dataset}; "
            f"its runs are {sorted({row.run for row in rows})}"
        )
    trained = found["top_1"]
    by_metric = {name: {dim: v for dim, v in values.items() if dim in trained} for name, values in found.items()}
    return Accuracies(by_metric, "the evaluation (eval.py)")


def _from_metrics(run: Path) -> Accuracies:
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{run} has no metrics.jsonl, so the card would have no accuracies; give the rows of eval.py")
    validations = [line for line in map(json.loads, path.read_text().splitlines()) if "epoch" in line]
    marker = "top_1/"
    values = [
        {int(key[len(marker) :]): value for key, value in line.items() if key.startswith(marker)}
        for line in validations
    ]
    last = next((each for each in reversed(values) if each), None)
    if last is None:
        raise UserError(f"{path} holds no validation, so the card would have no accuracies; give the rows of eval.py")
    return Accuracies({"top_1": last}, "the last validation of the training run")


def _table(by_metric: dict[str, dict[int, float]]) -> str:
    top_1 = by_metric["top_1"]
    others = [name for name in by_metric if name != "top_1"]
    lines = ["| " + " | ".join(["dims", "bytes", "top-1", "of full", *others]) + " |"]
    lines.append("| " + " | ".join(["---:"] * (4 + len(others))) + " |")
    for dim, value in sorted(top_1.items()):
        share = f"{100 * value / top_1[max(top_1)]:.1f}%" if top_1[max(top_1)] else "-"
        more = [f"{100 * by_metric[name][dim]:.2f}" if dim in by_metric[name] else "-" for name in others]
        lines.append("| " + " | ".join([str(dim), str(4 * dim), f"{100 * value:.2f}", share, *more]) + " |")
    return "\n".join(lines)


def _training(config: Config, info: ModelInfo, dataset: str) -> str:
    extras = [text for wanted, text in ((info.blurpool, "BlurPool"), (info.stem_stride != 4, "small stem")) if wanted]
    points = {
        "Data": f"{dataset}, {len(info.classes)} classes ({', '.join(info.classes[:3])}, ...)",
        "Network": ", ".join([f"timm {info.backbone}", f"initial weights: {config.model.init}", *extras]),
        "Sizes": f"{_words(info.nesting_list)}, {'one shared classifier' if info.tied else 'a classifier each'}",
        "Recipe": f"{config.train.epochs} epochs of batch {config.data.batch_size}, learning rate {config.optim.lr}, "
        f"weight decay {config.optim.weight_decay}, seed {config.run.seed}",
    }
    return "\n".join(f"- {name}: {text}" for name, text in points.items())


def _words(values: Sequence[int]) -> str:
    return ", ".join(map(str, values[:-1])) + (" and " if len(values) > 1 else "") + str(values[-1])


def _numbers(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"


FILES = ("model.safetensors", "model.json")
# What the Hub may get: the card, and what `mrl.interop.sentence_transformers` adds.
PUSHED = (*FILES, "README.md", "modules.json", "matryoshka.json", "config_sentence_transformers.json")


def export_folder(run: str | Path, out: str | Path, license: str, results: str | Path | None = None) -> Path:
    """``out``, after writing model.safetensors, model.json and README.md (the model card) into it.

    Args:
        run: A finished run directory.
        out: A folder that is new, empty, or an earlier export, which is replaced.
        license: Of the weights, as the Hub spells it: mit, cc-by-nc-4.0, other, ...
        results: Rows of eval.py to take accuracies from; the last validation of the training when None.

    Raises:
        UserError: The run is not finished, has no accuracies, or ``out`` holds other files.
    """
    run, out = Path(run), Path(out)
    card = model_card(run, license, None if results is None else Path(results))
    new_folder(out, earlier="model.json")
    model = load(run)
    assert model.info is not None  # load fills it
    save_model(model, model.info, out)
    atomic_write_text(out / "README.md", card)
    return out


def new_folder(out: Path, earlier: str) -> None:
    """Make the folder ``out``; one that exists must be empty or hold the file ``earlier`` of an earlier export.

    Raises:
        UserError: ``out`` is a file, a run directory, or holds other things.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; exports go into a folder")
    if out.is_dir() and any(out.iterdir()) and (not (out / earlier).exists() or (out / "config.yaml").exists()):
        raise UserError(f"{out} holds files that are not of an earlier export; give a new or empty folder")
    out.mkdir(parents=True, exist_ok=True)


def push_to_hub(folder: str | Path, repo_id: str, private: bool = False) -> str:
    """The address of the Hub repository, after uploading an exported folder to it; made if it does not exist.

    Raises:
        UserError: The folder is not an export, or the Hub refuses, e.g. because nobody is logged in.
    """
    from huggingface_hub import HfApi

    folder = Path(folder)
    load(folder)
    if not (folder / "README.md").is_file():
        raise UserError(f"{folder} has no README.md; export the run first, so that the Hub gets a model card")
    try:
        api = HfApi()
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=list(PUSHED))
    except Exception as error:  # the Hub's client raises errors of many kinds
        raise UserError(
            f"{folder} could not be pushed to {repo_id!r} ({error}); log in with 'hf auth login' and try again"
        ) from error
    return str(address)


def from_pretrained(source: str | Path, revision: str | None = None) -> MatryoshkaClassifier:
    """The model of an exported folder, a run directory, or a Hub id, in eval mode on the CPU.

    Args:
        source: A folder, else an id ``owner/name``. Downloads stay in the Hub's cache.
        revision: Branch, tag or commit on the Hub; not for folders.

    Raises:
        UserError: It is neither, the Hub cannot be reached or has no such model, or as `mrl.model.load`.
    """
    if Path(source).is_dir():
        if revision is not None:
            raise UserError(f"{source} is a folder, which has no revisions; leave out revision {revision!r}")
        return load(source)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise UserError(f"{str(source)!r} is neither an existing folder nor a Hub id such as owner/name")
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(str(source), revision=revision, allow_patterns=list(FILES))
    except Exception as error:  # the Hub's client raises errors of many kinds
        raise UserError(f"{source} is no folder here, and could not be had from the Hub: {error}") from error
    return load(folder)
