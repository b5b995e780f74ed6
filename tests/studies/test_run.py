"""Opened runs: what belongs together, what is embedded anew, and what is used again (digits, a small model)."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torchcodec.encoders import PngEncoder

from mrl.config import Config, DataConfig
from mrl.distributed import Process
from mrl.errors import UserError
from mrl.model import build_model, load, save_model
from mrl.studies import run as module
from mrl.studies.classification import predict
from mrl.studies.run import dataset_name, embed_runs, open_run, place_images
from mrl.studies.transfer import TransferImages, read_folder, with_images

ALONE = Process(0, 1, torch.device("cpu"))


@pytest.fixture
def run(tmp_path, make_digits_run):
    return make_digits_run(tmp_path / "run", (8, 32))


@pytest.fixture
def reads(monkeypatch):
    """The splits that are read, in turn."""
    found, real = [], module.build_data
    monkeypatch.setattr(
        module, "build_data", lambda *a, splits, **k: found.extend(splits) or real(*a, splits=splits, **k)
    )
    return found


@pytest.fixture
def scans(tmp_path):
    generator = np.random.default_rng(0)
    for name in ("3", "7"):
        (tmp_path / "scans" / name).mkdir(parents=True)
        for i in range(4):
            pixels = torch.from_numpy(generator.integers(256, size=(3, 20, 24), dtype=np.uint8))
            PngEncoder(pixels).to_file(str(tmp_path / "scans" / name / f"{i}.png"))
    return tmp_path / "scans"


def embed(run, *folders, force=False):
    transfer = TransferImages(robustness=[read_folder("--robustness", str(folder)) for folder in folders])
    [opened] = embed_runs({"run": run}, transfer, 64, force, ALONE)
    return opened


def change(run, **data):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"] |= data
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def test_embeddings_images_and_classifiers_of_a_run_belong_together(run):
    embed(run)
    opened = open_run(run)
    assert str(opened) == (
        "run: MRL of vit_tiny_patch16_224 on digits, sizes 8, 32; 1,442 training and 355 validation images "
        "of 10 classes"
    )
    indices = np.array([3, 350, 7])
    images, pictures = opened.images("val", indices), opened.pictures("val", indices)
    with torch.no_grad():
        np.testing.assert_allclose(opened.model.embed(images), opened.val.vectors[indices], atol=1e-4)
        expected = opened.model(images).argmax(dim=2)
    np.testing.assert_array_equal(predict(opened.val.vectors[indices], opened.classifiers).classes, expected)
    assert pictures.shape == (3, 16, 16, 3) and pictures.min() >= 0 and pictures.max() <= 1
    again = (pictures - np.float32(opened.config.data.mean)) / np.float32(opened.config.data.std)
    np.testing.assert_allclose(again.transpose(0, 3, 1, 2), images, atol=1e-5)


def test_a_fixed_feature_run_is_truncated_to_the_sizes_of_nested_runs_beside_it_else_to_its_halves(
    run, tmp_path, make_digits_run, reads
):
    runs = {"run": run} | {f"ff{dim}": make_digits_run(tmp_path / f"ff{dim}", (dim,)) for dim in (32, 8)}
    together = embed_runs(runs, TransferImages(), 64, False, ALONE)
    assert [one.dims for one in together] == [(8, 32), (8, 32), (8,)] and len(together[1].classifiers) == 2
    assert reads == ["train", "val"], "the same data is read once"
    opened = open_run(runs["ff32"])
    assert (opened.dims, opened.method) == ((8, 16, 32), "FF truncated")
    weight, bias = opened.head.weights_and_biases()[0]
    for dim, (of_size, of_bias) in zip(opened.dims, opened.classifiers, strict=True):
        assert torch.equal(of_size, weight[:, :dim]) and torch.equal(of_bias, bias)


def test_a_run_without_embeddings_of_its_model_is_refused_with_the_command_to_run(run, tmp_path):
    with pytest.raises(UserError, match=r"config\.yaml does not exist"):
        open_run(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no embeddings of its train and val images .* run: python eval\.py --runs"):
        open_run(run)


def test_other_images_are_embedded_as_the_model_preprocesses_them(run, scans, reads):
    found = embed(run, scans).transfer["images_scans"]
    assert reads == ["train", "val", "scans"]
    model = load(run)
    paths = [scans / name / f"{i}.png" for name in ("3", "7") for i in range(4)]
    with torch.no_grad():
        expected = model.embed(torch.stack([model.preprocess(Image.open(path)) for path in paths])).numpy()
    np.testing.assert_allclose(found.vectors, expected, atol=0.05)
    assert np.corrcoef(found.vectors.ravel(), expected.ravel())[0, 1] > 0.999
    assert found.labels.tolist() == [0] * 4 + [1] * 4
    embed(run, scans)
    assert reads == ["train", "val", "scans"], "the second time nothing is read"
    (scans / "7" / "3.png").rename(scans / "7" / "9.png")
    embed(run, scans)
    assert reads == ["train", "val", "scans", "scans"], "other files under one name"


def test_what_changes_embeddings_is_embedded_anew_and_anything_by_force(run, reads):
    assert embed(run).val_flip is not None, "trained with flips"
    change(run, flip=False)
    assert embed(run).val_flip is None
    for data in ({"eval_resize_px": 24}, {"mean": [0.4, 0.5, 0.6]}):
        before = np.array(embed(run).val.vectors)
        change(run, **data)
        assert not np.array_equal(embed(run).val.vectors, before)
    assert reads == ["train", "val"] * 3
    reads.clear()
    model = load(run)
    with torch.no_grad():
        next(model.backbone.parameters()).add_(0.1)
    save_model(model, model.info, run)
    embed(run)
    embed(run, force=True)
    shutil.rmtree(run / "embeddings" / "val")
    embed(run)
    assert reads == [*["train", "val"] * 2, "val"]
    for path in run.glob("embeddings/*/metadata.json"):
        path.write_text(path.read_text().replace("fp32", "bf16"))
    assert open_run(run).val.metadata.precision == "bf16"


def test_other_images_that_do_not_fit_are_refused_before_any_image_is_read(run, scans, reads):
    (scans / "7").rename(scans / "eleven")
    with pytest.raises(UserError, match="eleven"):
        embed(run, scans)
    assert not reads


@pytest.mark.parametrize(
    ("name", "root", "num_classes", "called"),
    [
        ("folder", "/somewhere/flowers", 3, "flowers"),
        ("digits", None, 10, "digits"),
        ("imagenet", "/somewhere/imagenet", 1000, "imagenet"),
        ("imagenet", "/somewhere/imagenet", 100, "imagenet_100_classes"),
        ("folder", "/somewhere/imagenet", 100, "imagenet_folder"),
    ],
)
def test_a_folder_of_images_has_its_own_name_and_only_the_whole_of_imagenet_is_called_so(
    name, root, num_classes, called
):
    assert dataset_name(Config(data=DataConfig(name=name, root=root)), num_classes) == called


def test_a_link_to_images_names_them_and_so_does_the_folder_of_training(tmp_path, monkeypatch):
    (tmp_path / "flowers_v2").mkdir()
    (tmp_path / "flowers").symlink_to("flowers_v2")
    config = Config(data=DataConfig(name="folder", root=str(tmp_path / "flowers")))
    assert dataset_name(config, 2) == "flowers"
    (tmp_path / "provenance.json").write_text(json.dumps([{"folder": str(tmp_path / "flowers")}]))
    monkeypatch.chdir(tmp_path)
    here = Config(data=DataConfig(name="folder", root="."))
    assert dataset_name(place_images(tmp_path, here), 2) == "flowers"


@pytest.fixture
def pets(run, tmp_path):
    """The run for a folder of images of two classes in train and one in val."""
    for place in ("train/cat", "train/dog", "val/dog"):
        (tmp_path / "pets" / place).mkdir(parents=True)
        for i in range(3):
            pixels = torch.randint(256, (3, 20, 24), dtype=torch.uint8)
            PngEncoder(pixels).to_file(str(tmp_path / "pets" / place / f"{i}.png"))
    model = load(run)
    info = dataclasses.replace(model.info, classes=("cat", "dog"))
    save_model(build_model(model.backbone, 2, (8, 32)), info, run)
    change(run, name="folder", root=str(tmp_path / "pets"), missing_classes="allow")
    return run


def test_validation_images_of_some_classes_keep_the_labels_of_the_model(pets):
    opened = embed(pets)
    assert opened.val.labels.tolist() == [1, 1, 1] and opened.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    shutil.rmtree(pets / "embeddings" / "val")  # val alone is read, and does not know the classes of train
    assert embed(pets).val.labels.tolist() == [1, 1, 1]


def test_images_are_turned_as_the_model_was_trained_whatever_the_default_is(pets, tmp_path):
    upright = np.concatenate([np.zeros((10, 20, 3), np.uint8), np.full((10, 20, 3), 255, np.uint8)])
    exif = Image.Exif()
    exif[0x112] = 3
    for path in (tmp_path / "pets" / "val" / "dog").iterdir():
        Image.fromarray(upright).save(path, exif=exif)
    for rule, brightness in (("ignore", 0), ("apply", 1)):
        about = json.loads((pets / "model.json").read_text())
        (pets / "model.json").write_text(json.dumps(about | {"exif_rotation": rule}))
        assert embed(pets, force=True).pictures("val", [0])[0, 0].mean() == pytest.approx(brightness, abs=0.1)


def test_pictures_are_not_shown_if_the_images_have_changed_since_the_evaluation(pets, tmp_path):
    embed(pets)
    (tmp_path / "pets" / "train" / "cat" / "1.png").unlink()
    opened = open_run(pets)
    assert opened.pictures("val", [0]).shape == (1, 16, 16, 3)
    with pytest.raises(UserError, match=r"the train images have changed .*eval\.py --runs .*run --force"):
        opened.pictures("train", [0])


def test_images_of_another_folder_take_the_place_of_the_runs_own(run, scans, tmp_path, monkeypatch):
    embed(run)
    opened = open_run(run, title="my scans")
    assert opened.source.title == "my scans, run" and with_images(opened, None) is opened
    for split in ("train", "val"):
        shutil.copytree(scans, tmp_path / "cups" / split)
    (tmp_path / "cups" / "val" / "7" / "0.png").unlink()
    shown = with_images(opened, str(tmp_path / "cups"))
    assert (shown.image_classes, shown.source.dataset, len(shown.classes)) == (("3", "7"), "cups", 10)
    assert (len(shown.train.labels), shown.val.labels.tolist()) == (8, [0, 0, 0, 0, 1, 1, 1])
    with torch.no_grad():
        expected = opened.model.embed(shown.images("val", np.arange(7)))
    np.testing.assert_allclose(shown.val.vectors, expected, atol=1e-4)
    assert "8 images of cups/train and 7 of cups/val, of 2 classes" in str(shown)
    monkeypatch.setattr(opened.model.backbone, "forward_features", None)
    with_images(opened, str(tmp_path / "cups"))  # embedded once
    (tmp_path / "cups" / "val" / "7").rename(tmp_path / "cups" / "val" / "8")
    with pytest.raises(UserError, match="hold different classes"):
        with_images(opened, str(tmp_path / "cups"))
