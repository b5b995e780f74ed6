"""A run as a folder for the Hugging Face Hub: weights, model.json, and a model card."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pandas as pd
from huggingface_hub import EvalResult, HfApi, ModelCardData

from mrl.config import read_config
from mrl.data.folder import unicode_name
from mrl.errors import UserError
from mrl.model import HUB_FILES, PAPER, load
from mrl.results import Row, markdown, method_name, read_rows
from mrl.rundir import last_validation
from mrl.studies import quantization
from mrl.studies.run import dataset_name, place_images

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
    place, dataset = run.resolve(), dataset_name(place_images(run, config), len(info.classes))
    name = unicode_name(place.name)
    method = method_name(info.nesting_list, config.head)
    if results:
        rows = pd.DataFrame(map(vars, read_rows(results)), columns=[field.name for field in fields(Row)])
        of_run = rows.run.isin([name, unicode_name(f"{place.parent.name}/{place.name}")])  # as eval.py names runs
        own = rows[of_run & (rows.method == method) & (rows.dataset == dataset)]
        accuracies, fewer_bytes, source = _evaluated(own), _fewer_bytes(own), "eval.py"
        if accuracies.empty:
            found = f"its runs are {sorted(rows.run.unique())}"
            raise UserError(f"{results} holds no top-1 of the run {name!r} ({method}) on {dataset}; {found}")
    elif top_1 := last_validation(run):
        accuracies, fewer_bytes = pd.DataFrame({"top-1": top_1}).sort_index(), ""
        source = "the last validation of the training"
    else:
        raise UserError(f"{run}/metrics.jsonl holds no validation; give the rows of eval.py with --results")
    metadata = ModelCardData(
        license=license,
        tags=["matryoshka", "image-feature-extraction"],
        pipeline_tag="image-feature-extraction",
        model_name=name,
        eval_results=[
            EvalResult("image-classification", dataset, dataset, "accuracy", value, metric_name=f"top-1 at {dim} dims")
            for dim, value in accuracies["top-1"].items()
        ],
    )
    dims = ", ".join(map(str, info.nesting_list))
    largest = info.nesting_list[-1]
    left = model.width - largest
    untrained = f" The backbone's last {left} numbers were not trained." if left else ""
    example_dim = info.nesting_list[(len(info.nesting_list) - 1) // 2]
    trainable, optim = config.model.trainable, config.optim
    layers = trainable if isinstance(trainable, str) else ", ".join([*trainable, "head"])
    steps = config.data.min_steps_per_epoch
    cut = f" (smaller where an epoch would have fewer than {steps} steps)" if steps > 1 else ""
    init = Path(config.model.init).name  # "scratch", "pretrained", or what it started from, without the folders
    changes = {", BlurPool": info.blurpool, ", small stem": info.stem_stride != 4, ", projection": info.projection}
    network = f"timm {info.backbone}{''.join(name for name, made in changes.items() if made)}"
    recipe = f"""Trained layers: {layers}
- Optimizer: {optim.name}, learning rate {optim.lr} ({optim.schedule} schedule), layer decay \
{optim.layer_decay}, weight decay {optim.weight_decay}
- Length: {config.train.epochs} epochs of batch {config.data.batch_size}{cut}, seed {config.run.seed}"""
    if (record := run / "provenance.json").is_file() and '"imported_from"' in record.read_text(encoding="utf-8"):
        init, recipe = "those of the imported checkpoint", "The checkpoint does not tell how it was trained"
    model.card = f"""---
{metadata.to_yaml()}
---

# {name}

This model ({info.backbone}, {method}, trained on {dataset}) embeds images. The first d numbers of an embedding are
an embedding too, for d = {dims}: cut it to the size that you can afford, then normalize it. The method is
[Matryoshka Representation Learning]({PAPER}).

## Size and accuracy

{_accuracy_table(accuracies)}

Percent of the validation images of {dataset}; "of full" is the share of the accuracy at {accuracies.index[-1]} dims.
Bytes are those of a float32 vector. Source of the numbers: {source}.
{fewer_bytes}
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
- {recipe}

## License of the weights

`{license}`. The terms of the training images may apply to the weights too.
"""
    new_folder(out)
    model.save_pretrained(out)
    return out


def new_folder(out: Path) -> None:
    """Create the folder ``out``; one that exists must be empty or hold an earlier export."""
    if out.is_dir() and any(out.iterdir()) and (not (out / "model.json").exists() or (out / "config.yaml").exists()):
        raise UserError(f"{out} holds files that are not of an earlier export; give a new or empty folder")
    out.mkdir(parents=True, exist_ok=True)


def push_to_hub(folder: Path, repo_id: str, private: bool = False) -> str:
    """Upload an exported folder, and return the address of the repository, which is created if necessary."""
    try:
        address = HfApi().create_repo(repo_id, private=private, exist_ok=True)
        HfApi().upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=list(UPLOADED))
    except Exception as error:  # the Hub's client raises errors of many kinds
        raise UserError(f"{folder} could not be pushed to {repo_id!r} ({error}); first: hf auth login") from error
    return str(address)


def _evaluated(own: pd.DataFrame) -> pd.DataFrame:
    """Return the accuracies in rows of one run: a line per dim, and a column for each of `CARD_METRICS`."""
    own = own.assign(column=[CARD_METRICS.get(pair) for pair in zip(own.study, own.metric, strict=True)])
    own = own.dropna(subset=["column", "dim"]).astype({"dim": int})
    own = own.drop_duplicates(["dim", "column"], keep="last")
    table = own.pivot(index="dim", columns="column", values="value").reindex(columns=[*CARD_METRICS.values()])
    return table.dropna(subset="top-1").dropna(axis="columns", how="all")


def _accuracy_table(accuracies: pd.DataFrame) -> str:
    table = pd.DataFrame({"dims": accuracies.index, "bytes": 4 * accuracies.index}, index=accuracies.index)
    top_1 = accuracies["top-1"]
    percent = (100 * accuracies).map("{:.2f}".format, na_action="ignore").fillna("-")
    table["top-1"] = percent.pop("top-1")
    table["of full"] = (100 * top_1 / top_1.iloc[-1]).map("{:.1f}%".format)
    return _markdown(table.join(percent))


def _fewer_bytes(own: pd.DataFrame) -> str:
    """Return the part of the card about quantization: codes that no other code of as few bytes beats; or ""."""
    points = own[(own.study == quantization.STUDY) & (own.metric == "top_1") & own.shortlist_size.isna()]
    if points.empty:
        return ""
    front = quantization.pareto_front(points.assign(percent=100 * points.value))
    columns = {"bytes": front.bytes.astype(int), "dims": front.dim.astype(int), "code": front.code}
    table = _markdown(pd.DataFrame(columns | {"1-NN": front.percent.map("{:.2f}".format)}))
    return f"""
### In fewer bytes

Each line is more accurate in 1-NN than any dims and code of as few bytes. FAISS codes the normalized prefix; the
queries are not rounded, except for sign bits.

{table}
"""


def _markdown(table: pd.DataFrame) -> str:
    return markdown([table.columns, *table.to_numpy().tolist()], rule="---:")
