"""What is embedded anew, and what is used again: digits and an untrained model."""

import dataclasses

import numpy as np
import pytest
import torch
import yaml
from torchvision.io import write_png

from mrl.config import Config, DataConfig, HeadConfig, to_yaml
from mrl.distributed import Process
from mrl.errors import UserError
from mrl.model import ModelInfo, build_backbone, build_model, load, save_model
from mrl.studies import embed_runs as module
from mrl.studies.embed_runs import embed_runs
from mrl.studies.transfer import TransferImages, read_folder

ALONE = Process(0, 1, torch.device("cpu"))
VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
DATA = DataConfig(name="digits", batch_size=64, train_px=16, eval_resize_px=16, eval_px=16, num_workers=0)


@pytest.fixture
def run(tmp_path):
    backbone = build_backbone("vit_tiny_patch16_224", "scratch", 4, False, VIT)
    classes = tuple(str(digit) for digit in range(10))
    info = ModelInfo("vit_tiny_patch16_224", VIT, 4, False, (8, 32), False, classes, 16, 16, DATA.mean, DATA.std)
    (tmp_path / "run").mkdir()
    save_model(build_model(backbone, 10, (8, 32)), info, tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(Config(data=DATA, head=HeadConfig(nesting_list=[8, 32]))))
    return tmp_path / "run"


@pytest.fixture
def reads(monkeypatch):
    """The splits that are read, in turn."""
    found, real = [], module.build_data
    monkeypatch.setattr(module, "build_data", lambda *args, splits: found.extend(splits) or real(*args, splits=splits))
    return found


@pytest.fixture
def scans(tmp_path):
    generator = np.random.default_rng(0)
    for name in ("3", "7"):
        (tmp_path / "scans" / name).mkdir(parents=True)
        for i in range(4):
            pixels = torch.from_numpy(generator.integers(256, size=(3, 20, 24), dtype=np.uint8))
            write_png(pixels, str(tmp_path / "scans" / name / f"{i}.png"))
    return tmp_path / "scans"


def embed(run, *folders):
    further = TransferImages(robustness=[read_folder("--robustness", str(folder)) for folder in folders])
    [embedded] = embed_runs({"run": run}, further, 64, False, ALONE)
    return embedded


def change(run, **data):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"] |= data
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def test_further_images_are_embedded_as_the_model_preprocesses_them(run, scans, reads):
    from PIL import Image

    found = embed(run, scans).further["images_scans"]
    assert reads == ["train", "val", "scans"]
    model = load(run)
    paths = [scans / name / f"{i}.png" for name in ("3", "7") for i in range(4)]
    images = torch.stack([model.preprocess(Image.open(path)) for path in paths])
    with torch.no_grad():
        expected = model.embed(images).numpy()
    np.testing.assert_allclose(found.vectors, expected, atol=0.05)
    assert np.corrcoef(found.vectors.ravel(), expected.ravel())[0, 1] > 0.999
    assert found.labels.tolist() == [0] * 4 + [1] * 4
    embed(run, scans)
    assert reads == ["train", "val", "scans"], "the second time nothing is read"


def test_other_files_under_one_name_are_embedded_anew(run, scans, reads):
    embed(run, scans)
    (scans / "7" / "3.png").rename(scans / "7" / "9.png")
    embed(run, scans)
    assert reads == ["train", "val", "scans", "scans"]


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


def test_mirrored_images_are_kept_where_the_run_saw_such(run, reads):
    assert embed(run).val_flip is not None
    change(run, flip=False)
    assert embed(run).val_flip is None
    assert reads == ["train", "val"]


def test_further_images_that_do_not_fit_are_refused_before_any_image_is_read(run, scans, reads):
    (scans / "7").rename(scans / "eleven")
    with pytest.raises(UserError, match="eleven"):
        embed(run, scans)
    assert not reads


def test_an_embedding_that_is_not_finite_is_refused_naming_the_image(run, monkeypatch):
    model = load(run)
    with torch.no_grad():
        next(model.backbone.parameters()).fill_(float("nan"))
    save_model(model, dataclasses.replace(model.info), run)
    with pytest.raises(UserError, match=r"image 0 \(train split\) holds NaN"):
        embed(run)
