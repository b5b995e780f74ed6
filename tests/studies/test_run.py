"""Opened runs: what belongs together, what is embedded anew, and what is used again (digits, a small model)."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from torchcodec.encoders import PngEncoder

from mrl.config import Config, DataConfig, HeadConfig, ModelConfig, to_yaml
from mrl.distributed import Process
from mrl.errors import UserError
from mrl.model import ModelInfo, build_backbone, build_model, load, save_model
from mrl.studies import run as module
from mrl.studies.classification import predict
from mrl.studies.run import dataset_name, embed_runs, open_run
from mrl.studies.transfer import TransferImages, read_folder, with_images

ALONE = Process(0, 1, torch.device("cpu"))
VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
DATA = DataConfig(name="digits", batch_size=64, train_px=16, eval_resize_px=18, eval_px=16, num_workers=0)


def make_run(directory, nesting_list):
    backbone = build_backbone("vit_tiny_patch16_224", "scratch", 4, False, VIT)
    classes = tuple(str(digit) for digit in range(10))
    info = ModelInfo("vit_tiny_patch16_224", VIT, 4, False, nesting_list, False, classes, 18, 16, DATA.mean, DATA.std)
    directory.mkdir()
    save_model(build_model(backbone, 10, nesting_list), info, directory)
    config = Config(data=DATA, model=ModelConfig("vit_tiny_patch16_224"), head=HeadConfig(list(nesting_list)))
    (directory / "config.yaml").write_text(to_yaml(config))
    return directory


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run", (8, 32))


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


def embed(run, *folders, force=False, precision="fp32"):
    transfer = TransferImages(robustness=[read_folder("--robustness", str(folder)) for folder in folders])
    [opened] = embed_runs({"run": run}, transfer, 64, force, ALONE, precision)
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
    images = opened.images("val", indices)
    with torch.no_grad():
        np.testing.assert_allclose(opened.model.embed(images), opened.val.vectors[indices], atol=1e-4)
        expected = opened.model(images).argmax(dim=2)
    np.testing.assert_array_equal(predict(opened.val.vectors[indices], opened.classifiers).classes, expected)
    pictures = opened.pictures("val", indices)
    assert pictures.shape == (3, 16, 16, 3) and pictures.min() >= 0 and pictures.max() <= 1
    mean, std = torch.tensor(DATA.mean), torch.tensor(DATA.std)
    again = ((torch.from_numpy(pictures) - mean) / std).permute(0, 3, 1, 2)
    torch.testing.assert_close(again, images, atol=1e-5, rtol=0)


def test_a_fixed_feature_run_is_opened_truncated_to_its_halves(tmp_path):
    embed(make_run(tmp_path / "ff", (32,)))
    opened = open_run(tmp_path / "ff")
    assert (opened.dims, opened.method) == ((8, 16, 32), "FF truncated")
    weight, bias = opened.head.weight_and_bias(0)
    for dim, (of_size, of_bias) in zip(opened.dims, opened.classifiers, strict=True):
        assert torch.equal(of_size, weight[:, :dim]) and torch.equal(of_bias, bias)


def test_a_fixed_feature_run_is_cut_at_the_sizes_of_the_nested_runs_beside_it(run, tmp_path):
    runs = {"run": run, "ff": make_run(tmp_path / "ff", (32,)), "ff8": make_run(tmp_path / "ff8", (8,))}
    opened = embed_runs(runs, TransferImages(), 64, False, ALONE)
    assert [one.dims for one in opened] == [(8, 32), (8, 32), (8,)]
    assert len(opened[1].classifiers) == 2


def test_a_run_without_embeddings_of_its_model_is_refused_with_the_command_to_run(run, tmp_path):
    with pytest.raises(UserError, match=r"config\.yaml does not exist"):
        open_run(tmp_path / "nowhere")
    embed(run)
    metadata = run / "embeddings" / "val" / "metadata.json"
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"checkpoint_sha256": "0"}))
    with pytest.raises(UserError, match=r"no embeddings of its val images .* run: python eval\.py --runs"):
        open_run(run)
    shutil.rmtree(run / "embeddings")
    with pytest.raises(UserError, match="its train and val images"):
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


@pytest.mark.parametrize(
    "data",
    [{"eval_resize_px": 24}, {"mean": [0.4, 0.5, 0.6]}, {"std": [0.1, 0.2, 0.3]}],
    ids=lambda data: next(iter(data)),
)
def test_another_transform_is_embedded_anew(run, reads, data):
    before = np.array(embed(run).val.vectors)
    change(run, **data)
    assert not np.array_equal(embed(run).val.vectors, before)
    assert reads == ["train", "val"] * 2


def test_a_changed_model_is_embedded_anew_and_an_unchanged_one_by_force(run, reads):
    before = np.array(embed(run).val.vectors)
    model = load(run)
    with torch.no_grad():
        next(model.backbone.parameters()).add_(0.1)
    save_model(model, model.info, run)
    assert not np.array_equal(embed(run).val.vectors, before)
    embed(run, force=True)
    shutil.rmtree(run / "embeddings" / "val")
    embed(run)
    assert reads == [*["train", "val"] * 3, "val"]


def test_bf16_is_embedded_anew_and_changes_the_embeddings_little(run):
    exact = np.array(embed(run).val.vectors)
    rounded = np.array(embed(run, precision="bf16").val.vectors)
    assert 0 < np.abs(rounded - exact).max() < 0.05 * np.abs(exact).max()
    np.testing.assert_array_equal(open_run(run).val.vectors, rounded)


def test_runs_with_the_same_data_read_the_images_once(run, tmp_path, reads):
    runs = {"run": run, "other": make_run(tmp_path / "other", (32,))}
    assert len(embed_runs(runs, TransferImages(), 64, False, ALONE)) == 2
    assert reads == ["train", "val"]


def test_mirrored_images_are_embedded_if_the_run_was_trained_with_flips(run, reads):
    assert embed(run).val_flip is not None
    change(run, flip=False)
    assert embed(run).val_flip is None
    assert reads == ["train", "val"]


def test_other_images_that_do_not_fit_are_refused_before_any_image_is_read(run, scans, reads):
    (scans / "7").rename(scans / "eleven")
    with pytest.raises(UserError, match="eleven"):
        embed(run, scans)
    assert not reads


def test_an_embedding_that_is_not_finite_is_refused_with_its_image(run):
    model = load(run)
    with torch.no_grad():
        next(model.backbone.parameters()).fill_(float("nan"))
    save_model(model, model.info, run)
    with pytest.raises(UserError, match=r"image 0 \(train split\) holds NaN"):
        embed(run)


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
    data = dataclasses.replace(DATA, name=name, root=root)
    assert dataset_name(Config(data=data), num_classes) == called


def image_run(tmp_path, classes, **data):
    """A run on an image folder of two classes in train and one in val, with model.json as ``data`` says."""
    for split, names in (("train", ("cat", "dog")), ("val", ("dog",))):
        for name in names:
            (tmp_path / "pets" / split / name).mkdir(parents=True)
            for i in range(3):
                PngEncoder(torch.randint(256, (3, 20, 24), dtype=torch.uint8)).to_file(
                    str(tmp_path / "pets" / split / name / f"{i}.png")
                )
    run = make_run(tmp_path / "run", (8, 32))
    about = json.loads((run / "model.json").read_text()) | {"classes": classes} | data
    (run / "model.json").write_text(json.dumps(about))
    model = build_model(build_backbone("vit_tiny_patch16_224", "scratch", 4, False, VIT), len(classes), (8, 32))
    save_file(model.state_dict(), run / "model.safetensors")
    change(run, name="folder", root=str(tmp_path / "pets"), missing_classes="allow")
    return run


def test_validation_images_of_some_classes_keep_the_labels_of_the_model(tmp_path):
    opened = embed(image_run(tmp_path, ["cat", "dog"]))
    assert opened.val.labels.tolist() == [1, 1, 1] and opened.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    shutil.rmtree(opened.directory / "embeddings" / "val")  # val alone is read, and does not know the classes of train
    assert embed(opened.directory).val.labels.tolist() == [1, 1, 1]


def test_images_are_turned_as_the_model_was_trained_whatever_the_default_is(tmp_path):
    run = image_run(tmp_path, ["cat", "dog"])
    upright = torch.cat([torch.zeros(3, 10, 20, dtype=torch.uint8), torch.full((3, 10, 20), 255, dtype=torch.uint8)], 1)
    exif = Image.Exif()
    exif[0x112] = 3
    for path in (tmp_path / "pets" / "val" / "dog").iterdir():
        Image.fromarray(upright.permute(1, 2, 0).numpy()).save(path, exif=exif)
    stored = embed(run)  # model.json of before has no rule
    assert stored.config.data.exif_rotation == "ignore" and "exif_rotation: apply" in (run / "config.yaml").read_text()
    assert stored.pictures("val", [0])[0, 0].mean() < 0.1
    about = json.loads((run / "model.json").read_text())
    (run / "model.json").write_text(json.dumps(about | {"exif_rotation": "apply"}))
    assert embed(run, force=True).pictures("val", [0])[0, 0].mean() > 0.9


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
    assert "8 training and 7 validation images of 2 classes" in str(shown)
    monkeypatch.setattr(opened.model.backbone, "forward_features", None)
    with_images(opened, str(tmp_path / "cups"))  # embedded once
    with pytest.raises(UserError, match="is not a folder"):
        with_images(opened, str(tmp_path / "nowhere"))
