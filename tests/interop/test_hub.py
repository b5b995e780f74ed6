import dataclasses
import json
import shutil
import sys
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard

import mrl
from mrl import export
from mrl.config import read_config, to_yaml
from mrl.errors import UserError
from mrl.interop import hub
from mrl.results import Source, write_rows


@pytest.fixture(scope="module")
def folder(saved_run, tmp_path_factory):
    return hub.export_folder(saved_run, tmp_path_factory.mktemp("exports") / "small", license="mit")


def test_a_hub_id_and_an_exported_folder_give_the_run_s_embeddings(saved_run, folder, images, tmp_path, monkeypatch):
    files = {path.name for path in folder.iterdir()}
    assert files == {"README.md", "config.json", "model.json", "model.safetensors"}
    commit = "0123456789abcdef" * 2 + "01234567"
    repository = tmp_path / "models--someone--small"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / commit).symlink_to(folder)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    original = mrl.load(saved_run)
    for source in (folder, "someone/small"):
        model = mrl.load(source)
        for dim in original.head.nesting_list:
            assert torch.equal(model.encode(images, dim), original.encode(images, dim))
    for source in ("someone/other", "no/such/folder", "a b/c"):
        with pytest.raises(UserError, match=f"{source} is not a folder, and could not be downloaded from the Hub"):
            mrl.load(source)
    with pytest.raises(UserError, match="could not be pushed to 'someone/small'.*hf auth login"):
        hub.push_to_hub(folder, "someone/small")
    with pytest.raises(UserError, match="format is 'pickle'; allowed: mrl, raivn"):
        mrl.load(folder, format="pickle")


def test_the_card_has_sizes_accuracies_shares_license_and_normalization(folder):
    card = ModelCard.load(folder / "README.md")
    card_results = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert card_results == {f"top-1 at {dim} dims": v for dim, v in {8: 0.5, 16: 0.6, 32: 0.7, 96: 0.8}.items()}
    assert card.data.license == "mit" and "matryoshka" in card.data.tags
    # 50 percent of the images are right, of 80 percent at full width: a share of 62.5 percent.
    assert "| 8 | 32 | 50.00 | 62.5% |" in card.text
    assert "| 96 | 384 | 80.00 | 100.0% |" in card.text
    for text in ("pets, 3 classes (cat, dog, eel, ...)", "*then* scale them", "36 px", "(0.485, 0.456, 0.406)"):
        assert text in card.text
    assert "not trained" not in card.text


def test_the_card_of_a_model_that_ends_below_the_width_offers_its_trained_size(ff_run, tmp_path):
    text = (hub.export_folder(ff_run, tmp_path / "out", "mit") / "README.md").read_text()
    assert "| 32 | 128 | 50.00 | 100.0% |" in text and "| 96 |" not in text
    assert "encode(images, dim=32)" in text and "default: 32" in text
    assert "last 64 numbers were not trained" in text


def test_the_card_tells_how_the_model_was_trained_without_paths_of_this_machine(saved_run, tmp_path):
    run = shutil.copytree(saved_run, tmp_path / "small")
    config = read_config(run / "config.yaml")
    init = str(tmp_path / "first" / "weights.pt")
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, root=str(tmp_path / "pets"), min_steps_per_epoch=4),
        model=dataclasses.replace(config.model, trainable=["layer3", "layer4"], init=init),
        optim=dataclasses.replace(
            config.optim, name="adamw", lr=0.001, weight_decay=0.05, schedule="cosine", layer_decay=0.5
        ),
    )
    (run / "config.yaml").write_text(to_yaml(config))
    text = (hub.export_folder(run, tmp_path / "out", "mit") / "README.md").read_text()
    assert "timm test_resnet, initial weights: weights.pt\n" in text and "Data: pets" in text
    assert "Trained layers: layer3, layer4, head\n" in text and str(tmp_path) not in text
    assert "Optimizer: adamw, learning rate 0.001 (cosine schedule), layer decay 0.5, weight decay 0.05\n" in text
    assert "(smaller where an epoch would have fewer than 4 steps), seed" in text
    (run / "provenance.json").write_text('[{"imported_from": "r50.pt"}]')
    text = (hub.export_folder(run, tmp_path / "out", "mit") / "README.md").read_text()
    assert "- The checkpoint does not tell how it was trained\n" in text and "adamw" not in text


def test_the_hub_s_own_methods_save_and_load_the_model_and_keep_its_card(saved_run, folder, images, tmp_path):
    model = mrl.MatryoshkaClassifier.from_pretrained(folder)
    model.save_pretrained(tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {path.name for path in folder.iterdir()}
    assert (tmp_path / "saved" / "README.md").read_text() == (folder / "README.md").read_text()
    loaded = mrl.MatryoshkaClassifier.from_pretrained(tmp_path / "saved")
    assert loaded.info == model.info and torch.equal(loaded.encode(images, 16), model.encode(images, 16))
    mrl.load(saved_run).save_pretrained(tmp_path / "plain")  # a run has no card yet
    card = ModelCard.load(tmp_path / "plain" / "README.md")
    assert "matryoshka" in card.data.tags and "arxiv.org/abs/2205.13147" in card.text


def test_the_card_can_take_its_numbers_from_the_rows_of_an_evaluation(saved_run, tmp_path):
    def card(rows):
        write_rows(rows, tmp_path / "results.jsonl")
        out = hub.export_folder(saved_run, tmp_path / "out", "mit", tmp_path / "results.jsonl")
        return (out / "README.md").read_text()

    source = Source("pets", "small", 0, 36, 32, False)
    rows = [source.row("classification", "MRL", "top_1", v, 5, dim=dim) for dim, v in [(8, 0.25), (96, 1.0)]]
    rows += [source.row("retrieval", "MRL", "map@10", v, 5, dim=dim) for dim, v in [(8, 0.125), (12, 0.5)]]
    # An evaluation also holds baselines, single classes and other data.
    rows += [source.row("classification", "FF random coordinates, probe", "top_1", 0.75, 5, dim=96)]
    rows += [source.row("per_class", "MRL", "top_1", 0.75, 5, dim=96)]
    rows += [Source("birds", "small", 0, 36, 32, False).row("retrieval", "MRL", "map@10", 0.75, 5, dim=8)]
    text = card([*rows, *rows])  # two evaluations of one run
    assert "| dims | bytes | top-1 | of full | mAP@10 |" in text
    assert "| 8 | 32 | 25.00 | 25.0% | 12.50 |" in text and "| 96 | 384 | 100.00 | 100.0% | - |" in text
    assert "| 12 " not in text and "In fewer bytes" not in text
    for size, code, value in [(32, "float32", 0.5), (8, "int8", 0.5), (4, "4 bits", 0.25), (16, "float16", 0.25)]:
        rows.append(source.row("quantization", "MRL", "top_1", value, 5, dim=8, code=code, bytes=size))
    better = {"code": "sign bits", "bytes": 1, "dim": 8}
    rows.append(source.row("quantization", "FF PCA", "top_1", 1.0, 5, **better))
    rows.append(source.row("quantization", "MRL", "top_1", 1.0, 5, shortlist_size=50, **better))
    lines = card(rows).partition("In fewer bytes")[2].split("## Use")[0].splitlines()
    assert [line for line in lines if line.startswith("|")][2:] == [
        "| 4 | 8 | 4 bits | 25.00 |",
        "| 8 | 8 | int8 | 50.00 |",
    ]
    # A copy of a run has the rows of its own folder.
    copy = shutil.copytree(saved_run, tmp_path / "before" / "copy")
    apart = [dataclasses.replace(row, run="before/copy", value=0.75) for row in rows[:2]]
    write_rows([*rows, *apart], tmp_path / "results.jsonl")
    out = hub.export_folder(copy, tmp_path / "out", "mit", tmp_path / "results.jsonl")
    assert "# copy\n" in (out / "README.md").read_text() and "| 8 | 32 | 75.00 |" in (out / "README.md").read_text()
    with pytest.raises(UserError, match=r"no top-1 of the run 'small' \(MRL\) on pets; its runs are \['other'\]"):
        card([Source("pets", "other", 0, 36, 32, False).row("oracle", "MRL", "top_1", 1, 5)])
    with pytest.raises(UserError, match=r"no top-1 of the run 'small' \(MRL\) on pets; its runs are \[\]"):
        card([])


def test_a_folder_with_other_files_is_refused_and_an_earlier_export_is_replaced(saved_run, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    for taken in (tmp_path, saved_run):
        with pytest.raises(UserError, match="not of an earlier export"):
            hub.export_folder(saved_run, taken, "mit")
    assert (tmp_path / "README.md").read_text() == "mine"
    folder = hub.export_folder(saved_run, tmp_path / "mine", "mit")
    hub.export_folder(saved_run, folder, "cc-by-4.0")
    assert "license: cc-by-4.0" in (folder / "README.md").read_text()
    content = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(content | {"format_version": 7, "pooling": "gem"}))
    with pytest.raises(UserError, match="format 7; this version reads format 1"):
        mrl.load(folder)


def test_the_command_writes_the_folder_or_prints_an_error_and_returns_2(saved_run, tmp_path, monkeypatch, capsys):
    argv = ["hub", "--license", "mit", "--out", str(tmp_path / "out"), "--run"]
    assert export.main([*argv, str(saved_run)]) == 0
    assert list(mrl.load(tmp_path / "out").info.classes) == ["cat", "dog", "eel"]
    assert export.main([*argv, str(tmp_path)]) == 2
    assert f"error: {tmp_path / 'config.yaml'} does not exist" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    monkeypatch.delitem(sys.modules, "mrl.interop.sentence_transformers", raising=False)
    assert export.main(["sentence_transformers", "--run", str(saved_run), "--out", str(tmp_path / "st")]) == 2
    assert "pip install 'sentence-transformers>=5.4'" in capsys.readouterr().err


def test_the_command_takes_rows_and_uploads_only_the_files_of_an_export(saved_run, tmp_path, monkeypatch):
    calls = []
    api = SimpleNamespace(
        create_repo=lambda name, **how: calls.append((name, how)) or "address",
        upload_folder=lambda **how: calls.append(how),
    )
    monkeypatch.setattr(hub, "HfApi", lambda: api)
    row = Source("pets", "small", 0, 36, 32, False).row("classification", "MRL", "top_1", 0.25, 5, dim=8)
    write_rows([row], tmp_path / "results.jsonl")
    argv = ["hub", "--run", str(saved_run), "--license", "mit", "--out", str(tmp_path / "out"), "--push", "me/small"]
    assert export.main([*argv, "--private", "--results", str(tmp_path / "results.jsonl")]) == 0
    assert "| 8 | 32 | 25.00 |" in (tmp_path / "out" / "README.md").read_text()
    assert calls[0] == ("me/small", {"private": True, "exist_ok": True})
    assert calls[1]["allow_patterns"] == list(hub.UPLOADED)
