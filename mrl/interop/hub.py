"""A model as a folder that the Hugging Face Hub takes: weights, description, model card."""

from __future__ import annotations

import re
from pathlib import Path

from mrl.errors import UserError
from mrl.files import write_text
from mrl.interop.card import model_card
from mrl.models import MatryoshkaClassifier, load, save_model

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
    write_text(out / "README.md", card)
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
        UserError: It is neither, the Hub cannot be reached or has no such model, or as `mrl.models.load`.
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
