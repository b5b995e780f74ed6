"""A run as a folder for the Hugging Face Hub: weights, model.json, and a model card."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
from huggingface_hub import EvalResult, HfApi, ModelCardData

from mrl.config import read_config
from mrl.errors import UserError
from mrl.model import HUB_FILES, PAPER, load
from mrl.results import method_name, read_rows
from mrl.studies import quantization
from mrl.studies.run import dataset_name

CARD_METRICS = {("classification", "top_1"): "top-1", ("retrieval", "top_1"): "1-NN", ("retrieval", "map@10"): "mAP@10"}
# The last three are written by `mrl.interop.sentence_transformers`.
UPLOADED = (*HUB_FILES, "modules.json", "matryoshka.json", "config_sentence_transformers.json")


def export_folder(run: str | Path, out: str | Path, license: str, results: str | Path | None = None) -> Path:
    """Write model.safetensors, model.json and README.md (the model card) of a finished run to ``out``, and return it.

    Args:
        out: A folder that is new, empty, or an earlier export, which is replaced.
        license: License of the weights as the Hub spells it: mit, cc-by-nc-4.0, other, ...
        results: Rows of eval.py to take accuracies from; None for the run's last validation.

    Raises:
        UserError: The run is not finished, its accuracies are not found, or ``out`` holds files of something else.
    """
    run, out = Path(run), Path(out)
    config, model = read_config(run / "config.yaml"), load(run)
    info = model.info
    assert info is not None
    name, dataset = config.run.name, dataset_name(config, len(info.classes))
    method = method_name(info.nesting_list, info.tied)
    accuracies = _evaluated(Path(results), name, method, dataset) if results else {"top-1": _last_validation(run)}
    source = "eval.py" if results else "the last validation of the training"
    top_1 = accuracies["top-1"]
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
    dims = ", ".join(map(str, info.nesting_list))
    largest = info.nesting_list[-1]
    untrained = f" The backbone's last {model.width - largest} numbers were not trained." * (largest < model.width)
    example_dim = info.nesting_list[(len(info.nesting_list) - 1) // 2]
    trainable, optim, schedule = config.model.trainable, config.optim, config.optim.schedule
    names = {"all": "all", "head": "the classifiers"}
    layers = names.get(trainable, "") if isinstance(trainable, str) else f"{', '.join(trainable)}, classifiers"
    init = config.model.init if config.model.init in ("scratch", "pretrained") else Path(config.model.init).name
    network = f"timm {info.backbone}{', BlurPool' * info.blurpool}{', small stem' * (info.stem_stride != 4)}"
    card = f"""---
{metadata.to_yaml()}
---

# {name}

This model ({info.backbone}, {method}, trained on {dataset}) embeds images. The first d numbers of an embedding are
an embedding too, for d = {dims}: cut it to the size that you can afford, then normalize it. The method is
[Matryoshka Representation Learning]({PAPER}).

## Size and accuracy

{_table(accuracies)}

Percent of the validation images of {dataset}; "of full" is the share of the accuracy at {max(top_1)} dims.
Bytes are those of a float32 vector. Source of the numbers: {source}.
{_fewer_bytes(Path(results), name, method, dataset) if results else ""}
## Use

```python
import torch
from PIL import Image

import mrl

model = mrl.load("DIR")  # this folder, or its id on the Hub
images = torch.stack([model.preprocess(Image.open(path)) for path in paths])
vectors = model.encode(images, dim={example_dim})  # (B, {example_dim}), length 1; default: {largest}
```

**Normalization.** Take the first `dim` numbers of the raw embedding, *then* scale them to length 1; compare by inner
product. After every further cut, scale again.{untrained}

**Images.** Shorter side resized to {info.resize_px} px ({info.interpolation}), center {info.crop_px} x \
{info.crop_px} px, RGB from 0 to 1, then minus {info.mean} and divided by {info.std}.

## Training

- Data: {dataset}, {len(info.classes)} classes ({", ".join(info.classes[:3])}, ...)
- Network: {network}, initial weights: {init}
- Trained dims: {dims}; {"one shared classifier" if info.tied else "a classifier each"}
- Trained layers: {layers}
- Optimizer: {optim.name}, learning rate {optim.lr} ({schedule} schedule), weight decay {optim.weight_decay}
- Length: {config.train.epochs} epochs of batch {config.data.batch_size}, seed {config.run.seed}

## License of the weights

`{license}`. The terms of the training images may apply to the weights too.
"""
    new_folder(out)
    model.card = card
    model.save_pretrained(out)
    return out


def new_folder(out: Path) -> None:
    """Create the folder ``out``; one that exists must be empty or hold an earlier export."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; exports go into a folder")
    if out.is_dir() and any(out.iterdir()) and (not (out / "model.json").exists() or (out / "config.yaml").exists()):
        raise UserError(f"{out} holds files that are not of an earlier export; give a new or empty folder")
    out.mkdir(parents=True, exist_ok=True)


def push_to_hub(folder: Path, repo_id: str, private: bool = False) -> str:
    """Upload an exported folder, and return the address of the repository, which is created if necessary."""
    try:
        address = HfApi().create_repo(repo_id, private=private, exist_ok=True)
        HfApi().upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=list(UPLOADED))
    except Exception as error:  # the Hub's client raises errors of many kinds
        raise UserError(
            f"{folder} could not be pushed to {repo_id!r} ({error}); log in with 'hf auth login' and try again"
        ) from error
    return str(address)


def _last_validation(run: Path) -> dict[int, float]:
    path, marker = run / "metrics.jsonl", "top_1/"
    lines = path.read_text().splitlines() if path.is_file() else []
    validations = [row for row in map(json.loads, lines) if any(key.startswith(marker) for key in row)]
    if not validations:
        raise UserError(f"{path} holds no validation; give the rows of eval.py with --results")
    return {int(key[len(marker) :]): value for key, value in validations[-1].items() if key.startswith(marker)}


def _evaluated(path: Path, run: str, method: str, dataset: str) -> dict[str, dict[int, float]]:
    """Return ``{metric: {dim: value}}`` of one run, without its baselines and its results on other data."""
    rows = read_rows(path)
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        metric = CARD_METRICS.get((row.study, row.metric))
        if metric and row.dim is not None and (row.run, row.method, row.dataset) == (run, method, dataset):
            found.setdefault(metric, {})[row.dim] = row.value
    if "top-1" not in found:
        runs = sorted({row.run for row in rows})
        raise UserError(f"{path} holds no top-1 of the run {run!r} ({method}) on {dataset}; its runs are {runs}")
    return found


def _fewer_bytes(path: Path, run: str, method: str, dataset: str) -> str:
    """Return the part of the card about quantization: codes that no other code of as few bytes beats; or ""."""
    wanted = (quantization.STUDY, run, method, dataset)
    rows = [row for row in read_rows(path) if (row.study, row.run, row.method, row.dataset) == wanted]
    points = pd.DataFrame([vars(row) for row in rows if row.metric == "top_1" and row.shortlist_size is None])
    if points.empty:
        return ""
    front = quantization.pareto_front(points.assign(percent=100 * points.value))
    cells = zip(front.bytes, front.dim, front.code, front.percent, strict=True)
    lines = [f"| {size} | {dim} | {code} | {percent:.2f} |" for size, dim, code, percent in cells]
    table = "\n".join(["| bytes | dims | code | 1-NN |", "| ---: | ---: | --- | ---: |", *lines])
    return f"""
### In fewer bytes

Each line is more accurate in 1-NN than any dims and code of as few bytes. FAISS codes the normalized prefix; the
queries are not rounded, except for sign bits.

{table}
"""


def _table(accuracies: dict[str, dict[int, float]]) -> str:
    top_1 = accuracies["top-1"]
    others = [name for name in accuracies if name != "top-1"]
    lines: list[list[object]] = [["dims", "bytes", "top-1", "of full", *others], ["---:"] * (4 + len(others))]
    for dim, value in sorted(top_1.items()):
        share = f"{100 * value / top_1[max(top_1)]:.1f}%" if top_1[max(top_1)] else "-"
        more = [f"{100 * accuracies[name][dim]:.2f}" if dim in accuracies[name] else "-" for name in others]
        lines.append([dim, 4 * dim, f"{100 * value:.2f}", share, *more])
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
