"""From a folder of photographs to a model: what is held out, how a small set is trained, and on which cores."""

import dataclasses
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

import mrl
import train
from mrl import embed, engine
from mrl.config import images_of_weights, parse_command_line
from mrl.data import build_data
from mrl.data.folder import list_and_hold_out
from mrl.data.images import default_workers
from mrl.data.transforms import cut_batch
from mrl.distributed import Process
from mrl.errors import UserError
from mrl.retrieval.embeddings import open_vectors
from mrl.studies.run import embed_runs, open_run
from mrl.studies.transfer import TransferImages, read_folder
from tests.test_train import stop_at

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
    """As `touch`; the images of each class are of one shade each."""
    touch(folder, **counts)
    for path in folder.rglob("*.jpg"):
        shade = 2 * int(path.stem) + 100 * (path.parent.name == "dog")
        Image.new("RGB", (44, 40), (shade,) * 3).save(path)


def argv_of(root, *more):
    return [*SMALL, "--data.name", "folder", "--data.root", str(root), *more]


def names(found):
    return [Path(path).parent.name + "/" + Path(path).name for path in found.paths]


@pytest.mark.parametrize("where", ["", "train"])
def test_a_share_of_every_class_is_held_out_the_same_whatever_else_there_is(where, tmp_path):
    counts = {"cat": 50, "dog": 11, "eel": 2, "fox": 1}
    touch(tmp_path / where, **counts)
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
    touch(tmp_path / where, cow=7)
    again = list_and_hold_out(tmp_path, 0.2)
    assert [name for name in names(again["val"]) if "cow" not in name] == names(found["val"])
    numbers = [int(name[4:-4]) for name in names(found["val"]) if name[:3] == "cat"]
    assert numbers != list(range(10)) and numbers != list(range(40, 50))


@pytest.mark.parametrize("inside", ["validation", "Valid", "test", "Train, Test", "Train, Val", "train, Val"])
def test_splits_under_other_names_are_not_taken_for_classes(tmp_path, inside):
    beside, _, inside = inside.rpartition(", ")
    touch(tmp_path / inside, cat=2)
    touch(tmp_path / (beside or "cats"), a=2)
    with pytest.raises(UserError, match=f"{tmp_path} holds {inside}; allowed: class folders, or train/ and val/"):
        list_and_hold_out(tmp_path, 0.2)


def test_val_is_used_where_it_is_and_asked_for_where_no_share_is_given(tmp_path, capsys):
    draw(tmp_path, cat=5, dog=5)
    with pytest.raises(UserError, match="train is missing"):
        build_data(parse_command_line(argv_of(tmp_path), "").data, 0, CPU)
    data = parse_command_line(argv_of(tmp_path, "--data.val_share", "0.4"), "").data
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
    root = tmp_path / "images"
    draw(root, cat=20, dog=20)
    argv = argv_of(root, "--data.val_share", "0.2", "--data.batch_size", "32", "--data.min_steps_per_epoch", "8")
    assert train.main([*argv, "--run.dir", str(tmp_path), "--run.name", "a"]) == 0
    printed = capsys.readouterr().out
    assert "batch cut from 32 to 4 images, so that an epoch of 32 images has 8 steps" in printed
    assert "steps 0 to 8, 8 an epoch; 4 images a step" in printed
    held_out = json.loads((tmp_path / "a" / "held_out.json").read_text())
    assert len(held_out) == 8 and all((root / name).is_file() for name in held_out)
    images = TransferImages(few_shot=[read_folder("--few_shot", str(root))])
    with pytest.raises(UserError, match="the run was trained on these images"):
        embed_runs({"a": tmp_path / "a"}, images, None, False, Process(0, 1, CPU))
    (root / "train").mkdir()
    for name in ("cat", "dog"):  # the hashes of other paths would draw another split
        (root / name).rename(root / "train" / name)
    assert train.main([*argv, "--run.dir", str(tmp_path), "--run.name", "a", "--run.resume", "auto"]) == 2
    assert "has no images" in capsys.readouterr().err
    assert json.loads((tmp_path / "a" / "held_out.json").read_text()) == held_out
    for name in ("cat", "dog"):
        (root / "train" / name).rename(root / name)
    (root / "train").rmdir()
    draw(root, cat=60, dog=60)
    [run] = embed_runs({"a": tmp_path / "a"}, TransferImages(), None, False, Process(0, 1, CPU))
    assert (len(run.train.labels), len(run.val.labels)) == (112, 8)
    shades = (255 * open_run(tmp_path / "a").pictures("val", range(8)).mean(axis=(1, 2, 3))).round()
    expected = [2 * int(Path(name).stem) + 100 * name.startswith("dog") for name in held_out]
    np.testing.assert_allclose(shades, expected, atol=2)


def test_a_batch_is_cut_to_what_splits_evenly_and_never_below_one_image_each():
    assert [cut_batch(64, n, 10, 1, 1) for n in (5000, 640, 639, 9)] == [64, 64, 63, 1]
    assert [cut_batch(64, n, 10, 2, 4) for n in (5000, 639, 9)] == [64, 56, 8]
    assert [cut_batch(64, n, 1, 1, 1) for n in (64, 20)] == [64, 20]


def test_a_run_keeps_its_cut_batch_when_it_resumes_in_other_shares(tmp_path, monkeypatch, capsys):
    draw(tmp_path / "pets", cat=20, dog=20)
    argv = argv_of(tmp_path / "pets", "--data.val_share", "0.2", "--data.batch_size", "32", "--run.dir", str(tmp_path))
    argv += ["--data.min_steps_per_epoch", "3", "--run.resume", "auto", "--train.epochs", "2"]
    with monkeypatch.context() as patch:
        stop_at(patch, 3, signal.SIGTERM)
        assert train.main([*argv, "--train.accumulation_steps", "4"]) == 143
    assert train.main([*argv, "--train.accumulation_steps", "3"]) == 2
    printed = capsys.readouterr()
    assert "was started with 8 images a step; allowed: a number of processes" in printed.err
    assert train.main(argv) == 0
    printed = printed.out + capsys.readouterr().out
    assert "steps 0 to 8, 4 an epoch; 8 images a step" in printed
    assert "steps 3 to 8, 4 an epoch; 8 images a step" in printed, "not 10, as a new run would have"


def test_a_batch_that_is_cut_has_pairs_of_images_for_mixup(tmp_path, capsys):
    draw(tmp_path / "pets", cat=20, dog=20)
    argv = argv_of(tmp_path / "pets", "--data.val_share", "0.2", "--data.batch_size", "32", "--run.dir", str(tmp_path))
    assert train.main([*argv, "--data.min_steps_per_epoch", "3", "--data.mixup", "0.2"]) == 0
    assert "3 an epoch; 10 images a step" in capsys.readouterr().out
    assert train.main([*argv, "--data.min_steps_per_epoch", "2", "--data.cutmix", "1", "--run.name", "b"]) == 0
    assert "2 an epoch; 16 images a step" in capsys.readouterr().out


def test_folders_called_scratch_or_pretrained_are_no_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("scratch", "pretrained"):
        (tmp_path / name).mkdir()
    draw(tmp_path / "pets", cat=4, dog=4)
    assert train.main([*argv_of("pets", "--data.val_share", "0.5"), "--data.batch_size", "4"]) == 0
    assert images_of_weights("resnet50", "pretrained")["eval_px"] == 224


def test_the_folder_of_the_command_holds_out_the_same_images_as_its_whole_path(tmp_path, monkeypatch):
    draw(tmp_path / "train", cat=10, dog=10)
    monkeypatch.chdir(tmp_path)
    of_path, of_here = (
        build_data(parse_command_line(argv_of(root, "--data.val_share", "0.2"), "").data, 0, CPU)
        for root in (tmp_path, ".")
    )
    assert of_here["val"].held_out == of_path["val"].held_out
    assert all((tmp_path / name).is_file() for name in of_here["val"].held_out)


def test_as_many_processes_decode_as_a_device_leaves_cores_for(monkeypatch):
    for cores, workers in ((1, 0), (2, 0), (8, 2), (64, 16)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, cores=cores: set(range(cores)), raising=False)
        assert default_workers(CPU) == workers and default_workers(torch.device("cuda")) == cores


def test_threads_are_fewer_only_while_worker_processes_read(tmp_path, monkeypatch):
    draw(tmp_path, cat=4, dog=4)
    threads = [2]
    monkeypatch.setattr("mrl.data.images.cores_per_process", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    for workers, expected in (("1", 1), ("0", 2)):
        argv = argv_of(tmp_path, "--data.val_share", "0.5", "--data.num_workers", workers)
        images = build_data(parse_command_line(argv, "").data, 0, CPU, False)["val"]
        batches = images.eval_batches([[0, 1], [2, 3]])
        next(batches)
        assert threads[-1] == expected
        list(batches)
        assert threads[-1] == 2


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_images_are_resized_as_the_weights_expect_by_training_preprocess_and_torchvision(tmp_path, interpolation):
    draw(tmp_path, cat=2, dog=2)
    argv = argv_of(tmp_path, "--data.val_share", "0.5", "--data.interpolation", interpolation, "--data.flip", "false")
    config = parse_command_line(argv, "")
    images = build_data(config.data, 0, CPU, False)["val"]
    path = tmp_path / images.held_out[0]
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 44, 3), dtype=np.uint8)).save(path)
    stored = build_data(dataclasses.replace(config.data, backend="memory"), 0, CPU, False)["val"]
    picture = Image.open(path)
    how = v2.InterpolationMode(interpolation)
    resized = v2.functional.resize(v2.functional.pil_to_tensor(picture), [36], how, antialias=True)
    pixels = v2.functional.center_crop(resized, [32, 32]) / 255
    expected = v2.functional.normalize(pixels, config.data.mean, config.data.std)
    model = train.make_model(config, 2)
    model.info = train.describe(config, model, ["cat", "dog"])
    torch.testing.assert_close(model.preprocess(picture), expected, atol=1e-5, rtol=0)
    for each in (images, stored):
        [(batch, _)] = each.eval_batches([[0]])
        torch.testing.assert_close(batch[0], expected, atol=1e-5, rtol=0)


def test_sizes_interpolation_and_normalization_come_from_the_weights_unless_given(saved_run):
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
    untrained = data(*lite, "scratch")
    assert (untrained.interpolation, untrained.train_px, untrained.eval_px) == ("bilinear", [(0, 160), (32, 192)], 224)
    mixed = data(*lite, "weights.pt", "--data.mean", "[0.4, 0.4, 0.4]")
    assert (mixed.mean, mixed.std, untrained.mean) == ((0.4,) * 3, (0.5,) * 3, (0.485, 0.456, 0.406))
    of_run = data("--model.init", str(saved_run))
    assert (of_run.eval_resize_px, of_run.eval_px, of_run.interpolation) == (36, 32, "bilinear")
    assert images_of_weights("volo_d4_448", "pretrained")["eval_resize_px"] == 448  # timm: 448 / 1.15


def test_embed_gives_the_vectors_of_encode_by_onnx_runtime_too(saved_run, pictures, tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(engine, "WORTH_AN_EXPORT_SECONDS", 0.0)
    out = tmp_path / "v.npy"
    argv = ["--run", saved_run, "--images", pictures.folder, "--out", out, "--num_workers", 0]
    assert embed.main([str(part) for part in argv]) == 0
    assert "computed by ONNX Runtime;" in capsys.readouterr().out
    model, found = mrl.load(saved_run), open_vectors(out)
    images = torch.stack([model.preprocess(Image.open(pictures.folder / name)) for name in found.ids])
    cosines = (model.encode(images) * torch.from_numpy(np.array(found.vectors))).sum(1)
    assert cosines.min() > 0.9999
