"""From a folder of photographs to a model: what is held out, how a small set is trained, and on which cores."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

import mrl
import train
from mrl import embed, engine
from mrl.config import parse_command_line
from mrl.data import build_data
from mrl.data.folder import FolderImages, list_and_hold_out
from mrl.data.images import default_workers, threads_beside
from mrl.data.transforms import cut_batch
from mrl.distributed import Process
from mrl.errors import UserError
from mrl.retrieval.embeddings import open_vectors
from mrl.studies.run import embed_runs, open_run
from mrl.studies.transfer import TransferImages

CPU = torch.device("cpu")
SMALL = ["--model.backbone", "test_resnet", "--data.train_px", "32", "--data.eval_px", "32", "--data.num_workers", "0"]
SMALL += ["--data.eval_resize_px", "36", "--train.epochs", "1", "--train.precision", "fp32", "--optim.lr", "0.01"]


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def touch(folder, **counts):
    for name, count in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            (folder / name / f"{number}.jpg").touch()


def draw(folder, **counts):
    touch(folder, **counts)
    for path in sorted(folder.rglob("*.jpg")):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 44, 3), dtype=np.uint8)).save(path)


def names(found):
    return [Path(path).parent.name + "/" + Path(path).name for path in found.paths]


def test_a_share_of_every_class_is_held_out_the_same_whatever_else_there_is(tmp_path):
    counts = {"cat": 50, "dog": 11, "eel": 2, "fox": 1}
    touch(tmp_path, **counts)
    found = list_and_hold_out(tmp_path, 0.2)
    assert sorted(names(found["train"]) + names(found["val"])) == sorted(
        f"{name}/{number}.jpg" for name, count in counts.items() for number in range(count)
    )
    assert found["train"].labels.bincount().tolist() == [40, 9, 1, 1]
    assert found["val"].labels.bincount().tolist() == [10, 2, 1] and found["val"].classes == ["cat", "dog", "eel"]
    assert found["train"].classes == ["cat", "dog", "eel", "fox"]  # one image cannot be in both
    for part in found.values():
        assert names(part) == sorted(names(part), key=lambda name: (name.split("/")[0], name))
        assert [part.classes[label] for label in part.labels] == [name.split("/")[0] for name in names(part)]
    touch(tmp_path, cow=7)
    again = list_and_hold_out(tmp_path, 0.2)
    assert [name for name in names(again["val"]) if "cow" not in name] == names(found["val"])
    numbers = [int(name[4:-4]) for name in names(found["val"]) if name[:3] == "cat"]
    assert numbers != list(range(10)) and numbers != list(range(40, 50))


def test_the_classes_may_lie_in_the_root_or_in_train(tmp_path):
    touch(tmp_path / "plain", cat=5, dog=5)
    touch(tmp_path / "split" / "train", cat=5, dog=5)
    for root in ("plain", "split"):
        found = list_and_hold_out(tmp_path / root, 0.2)
        assert len(found["train"].paths) == 8 and found["val"].classes == ["cat", "dog"]


@pytest.mark.parametrize(("inside", "named"), [("validation", "validation"), ("Valid", "Valid"), ("test", "test")])
def test_splits_under_other_names_are_not_taken_for_classes(tmp_path, inside, named):
    touch(tmp_path / inside, cat=2)
    touch(tmp_path / "cats", a=2)
    with pytest.raises(UserError, match=f"{tmp_path} holds {named}; allowed: class folders, or train/ and val/"):
        list_and_hold_out(tmp_path, 0.2)
    with pytest.raises(UserError, match="which is not a folder"):
        list_and_hold_out(tmp_path / "gone", 0.2)


def test_val_is_used_where_it_is_and_asked_for_where_no_share_is_given(tmp_path, capsys):
    draw(tmp_path, cat=5, dog=5)
    argv = [*SMALL, "--data.name", "folder", "--data.root", str(tmp_path)]
    with pytest.raises(UserError, match="train is missing"):
        build_data(parse_command_line(argv, "").data, 0, CPU)
    data = parse_command_line([*argv, "--data.val_share", "0.4"], "").data
    found = build_data(data, 0, CPU)
    assert (len(found["train"]), len(found["val"])) == (6, 4)
    assert f"val is held out of train, because {tmp_path} has no val/" in capsys.readouterr().out
    draw(tmp_path / "val", cat=1, dog=1)
    (tmp_path / "train").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / name).rename(tmp_path / "train" / name)
    found = build_data(data, 0, CPU)
    assert (len(found["train"]), len(found["val"])) == (10, 2) and found["val"].held_out is None
    for name, share in (("folder", "1"), ("imagenet", "0.2")):
        with pytest.raises(UserError, match=rf"data.val_share is {float(share)}; allowed: 0"):
            parse_command_line(["--data.name", name, "--data.val_share", share], "")


def test_a_run_lists_what_it_held_out_and_is_evaluated_on_exactly_that_when_images_were_added(tmp_path, capsys):
    root = tmp_path / "pets"
    draw(root, cat=20, dog=20)
    argv = [*SMALL, "--data.name", "folder", "--data.root", str(root), "--data.val_share", "0.2"]
    argv += ["--data.batch_size", "32", "--data.min_steps_per_epoch", "8", "--run.dir", str(tmp_path)]
    assert train.main([*argv, "--run.name", "a"]) == 0
    printed = capsys.readouterr().out
    assert "batch cut from 32 to 4 images, so that an epoch of 32 images has 8 steps or more" in printed
    assert "steps 0 to 8, 8 an epoch; 4 images a step" in printed
    held_out = json.loads((tmp_path / "a" / "held_out.json").read_text())
    assert len(held_out) == 8 and all((root / name).is_file() for name in held_out)
    draw(root, cat=60, dog=60)
    for path in root.rglob("*.jpg"):
        Image.fromarray(np.full((40, 40, 3), 2 * int(path.stem) + 100 * (path.parent.name == "dog"), np.uint8)).save(
            path
        )
    [run] = embed_runs({"a": tmp_path / "a"}, TransferImages(), None, False, Process(0, 1, CPU))
    assert (len(run.train.labels), len(run.val.labels)) == (112, 8)
    shades = (255 * open_run(tmp_path / "a").pictures("val", range(8)).mean(axis=(1, 2, 3))).round()
    expected = [2 * int(Path(name).stem) + 100 * name.startswith("dog") for name in held_out]
    np.testing.assert_allclose(shades, expected, atol=2)


def test_a_batch_is_cut_to_what_splits_evenly_and_never_below_one_image_each():
    assert [cut_batch(64, n, 10, 1, 1) for n in (5000, 640, 639, 9)] == [64, 64, 63, 1]
    assert [cut_batch(64, n, 10, 2, 4) for n in (5000, 639, 9)] == [64, 56, 8]
    assert cut_batch(64, 64, 1, 1, 1) == 64
    assert cut_batch(64, 20, 1, 1, 1) == 20


@pytest.mark.parametrize(("cores", "workers"), [(1, 0), (2, 0), (8, 2), (64, 16)])
def test_decoding_processes_and_threads_together_are_as_many_as_the_cores_of_a_cpu(monkeypatch, cores, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    assert default_workers(CPU) == workers and default_workers(torch.device("cuda")) == cores
    threads, before = [], torch.get_num_threads()
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    with threads_beside(workers):
        assert threads[-1] + workers == cores
    assert threads[-1] == cores and before > 0


def test_threads_are_fewer_only_while_worker_processes_read(tmp_path, monkeypatch):
    draw(tmp_path, cat=4, dog=4)
    monkeypatch.setattr("mrl.data.images.cores_per_process", lambda: 2)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for workers, expected in (("1", 1), ("0", 2)):
            argv = [*SMALL, "--data.name", "folder", "--data.root", str(tmp_path), "--data.val_share", "0.5"]
            data = parse_command_line([*argv, "--data.num_workers", workers], "").data
            batches = build_data(data, 0, CPU, False)["val"].eval_batches([[0, 1], [2, 3]])
            next(batches)
            assert torch.get_num_threads() == expected
            list(batches)
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_images_are_resized_as_the_weights_expect_by_training_preprocess_and_torchvision(tmp_path, interpolation):
    draw(tmp_path, cat=2, dog=2)
    argv = [*SMALL, "--data.name", "folder", "--data.root", str(tmp_path), "--data.val_share", "0.5"]
    data = parse_command_line([*argv, "--data.interpolation", interpolation, "--data.flip", "false"], "").data
    images = build_data(data, 0, CPU, False)["val"]
    assert isinstance(images, FolderImages)
    [(batch, _)] = images.eval_batches([[0]])
    picture = Image.open(tmp_path / images.held_out[0])
    how = v2.InterpolationMode(interpolation)
    resized = v2.functional.resize(v2.functional.pil_to_tensor(picture), [36], how, antialias=True)
    pixels = v2.functional.center_crop(resized, [32, 32]) / 255
    expected = v2.functional.normalize(pixels, data.mean, data.std)
    torch.testing.assert_close(batch[0], expected, atol=1e-5, rtol=0)
    config = parse_command_line([*argv, "--data.interpolation", interpolation], "")
    model = train.make_model(config, 2)
    model.info = train.describe(config, model, ["cat", "dog"])
    torch.testing.assert_close(model.preprocess(picture), batch[0], atol=1e-5, rtol=0)
    stored = build_data(dataclasses.replace(data, backend="memory"), 0, CPU, False)["val"]
    [(of_memory, _)] = stored.eval_batches([[0]])
    torch.testing.assert_close(of_memory[0], batch[0], atol=1e-5, rtol=0)


def test_sizes_and_interpolation_come_from_the_weights_unless_given(saved_run):
    def data(*argv):
        return parse_command_line(argv, "").data

    lite = ["--model.backbone", "tf_efficientnet_lite0", "--model.init"]
    found = data(*lite, "pretrained")
    assert (found.train_px, found.eval_px, found.eval_resize_px) == (224, 224, 256)
    assert (found.interpolation, found.mean) == ("bicubic", (0.5, 0.5, 0.5))
    given = data(*lite, "weights.pt", "--data.train_px", "128", "--data.interpolation", "bilinear")
    assert (given.train_px, given.eval_px, given.interpolation) == (128, 224, "bilinear")
    smaller = data(*lite, "weights.pt", "--data.eval_px", "140")
    assert (smaller.eval_px, smaller.eval_resize_px) == (140, 160)  # the same share of the image
    assert data(*lite, "weights.pt", "--data.eval_px", "140", "--data.eval_resize_px", "150").eval_resize_px == 150
    untrained = data(*lite, "scratch")
    assert (untrained.interpolation, untrained.train_px, untrained.eval_px) == ("bilinear", [(0, 160), (32, 192)], 224)
    of_run = data("--model.init", str(saved_run))
    assert (of_run.eval_resize_px, of_run.eval_px, of_run.interpolation) == (36, 32, "bilinear")


@pytest.mark.parametrize("with_onnx_runtime", [False, True])
def test_embed_gives_the_vectors_of_encode_with_any_engine(
    saved_run, pictures, tmp_path, monkeypatch, capsys, with_onnx_runtime
):
    if with_onnx_runtime:
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
        monkeypatch.setattr(engine, "WORTH_AN_EXPORT_SECONDS", 0.0)
    out = tmp_path / "v.npy"
    argv = ["--run", saved_run, "--images", pictures.folder, "--out", out, "--num_workers", 0]
    assert embed.main([str(word) for word in argv]) == 0
    name = "ONNX Runtime" if with_onnx_runtime else "PyTorch"
    assert f"computed by {name};" in capsys.readouterr().out
    model, found = mrl.load(saved_run), open_vectors(out)
    order = [[str(path.relative_to(pictures.folder)) for path in pictures.paths].index(name) for name in found.ids]
    images = torch.stack([model.preprocess(pictures.images[index]) for index in order])
    cosines = (model.encode(images) * torch.from_numpy(np.array(found.vectors))).sum(1)
    assert cosines.min() > 0.9999
