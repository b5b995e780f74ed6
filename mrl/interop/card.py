"""The model card (README.md of a Hub repository) of a run, written from what the run directory holds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import EvalResult, ModelCardData

from mrl.config import Config
from mrl.errors import UserError
from mrl.models import ModelInfo, load
from mrl.recipes import read_config
from mrl.results import Row, method_name, read_rows
from mrl.studies.embed_runs import dataset_name

PAPER = "https://arxiv.org/abs/2205.13147"


class Accuracies(NamedTuple):
    """``{dim: value in [0, 1]}`` by name of metric, and where the numbers are from."""

    by_metric: dict[str, dict[int, float]]
    source: str


def model_card(run: Path, license: str, results: Path | None = None) -> str:
    """The text of the card: sizes and their accuracy, use, normalisation, training data, licence.

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
embeddings of that size: cut the vector to the size that you can afford, then normalise it. The method is
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

**Normalisation.** Take the first `dim` numbers of the raw embedding, *then* scale them to length 1; compare by inner
product. A prefix of a vector that was normalised before is not normalised: scale it again after every cut.

**Images.** Shorter side resized to {info.resize_px} px, centre {info.crop_px} x {info.crop_px} px, RGB from 0 to 1,
then minus {_numbers(info.mean)} and divided by {_numbers(info.std)}.

## Training

{_training(config, info, dataset)}

## Licence of the weights

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
