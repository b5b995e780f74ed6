import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from mrl import adapt
from mrl.config import Config, DataConfig, HeadConfig, ModelConfig, RunConfig, to_yaml
from mrl.model import ModelInfo, build_backbone, build_model, save_model
from mrl.rundir import atomic_write_text

REPOSITORY = Path(__file__).resolve().parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def pytest_collection_modifyitems(items):
    missing = {
        "gpu": None if torch.cuda.is_available() else "needs a CUDA device",
        "ffcv": None if importlib.util.find_spec("ffcv") else "needs FFCV: make ffcv",
        "chromium": None if CHROMIUM else "needs Chromium: apt-get install chromium",
    }
    for item in items:
        for marker, reason in missing.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _few_steps():
    """Let maps of embeddings be fitted briefly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapt, "STEPS", 50)
        yield


TOP_1 = {8: 0.5, 16: 0.6, 32: 0.7, 96: 0.8}


@pytest.fixture(scope="session")
def make_saved_run(tmp_path_factory):
    """A run directory as train.py leaves it, of a small ResNet: random weights, BatchNorms that saw data."""

    def make(
        name="small", backbone="test_resnet", stem_stride=4, blurpool=False, kwargs=None, dims=None, projection=False
    ):
        torch.manual_seed(0)
        run = tmp_path_factory.mktemp("runs") / name
        run.mkdir()
        network = build_backbone(backbone, "scratch", stem_stride, blurpool, kwargs, projection)
        dims = dims or (8, 16, 32, network.head_hidden_size)
        model = build_model(network, 3, dims)
        with torch.no_grad():
            # timm starts branches at 0 or nearly: a network without them would embed the same
            for parameter in (parameter for parameter in network.parameters() if parameter.ndim == 1):
                parameter.uniform_(0.5, 1.5)
            model.train()(torch.randn(16, 3, 32, 32))
        settings = {"num_classes": 3, "eval_resize_px": 36, "eval_px": 32}
        config = Config(
            run=RunConfig(name=name),
            data=DataConfig(name="folder", root="pets", **settings),
            model=ModelConfig(backbone, "scratch", blurpool, stem_stride, projection=projection, kwargs=kwargs or {}),
            head=HeadConfig(nesting_list=list(dims)),
        )
        data = config.data
        names = ("cat", "dog", "eel")
        px = (data.eval_resize_px, data.eval_px)
        about = (backbone, kwargs or {}, stem_stride, blurpool, dims, False, names, *px, data.mean, data.std)
        save_model(model, ModelInfo(*about, projection=projection), run)
        atomic_write_text(run / "config.yaml", to_yaml(config))
        lines = [{"step": 5, "loss/8": 1.0}, {"step": 9, "epoch": 1, **{f"top_1/{dim}": 0.1 for dim in dims}}]
        lines += [{"step": 10, "epoch": 2, **{f"top_1/{dim}": value for dim, value in TOP_1.items()}}, {"step": 11}]
        atomic_write_text(run / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        return run

    return make


@pytest.fixture(scope="session")
def make_digits_run():
    """A run directory of a ViT of one block, 32 wide, for the digits; it was never trained."""
    name = "vit_tiny_patch16_224"
    kwargs = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    data = DataConfig(name="digits", batch_size=64, train_px=16, eval_resize_px=16, eval_px=16, num_workers=0)

    def make(directory, nesting_list, seed=0):
        torch.manual_seed(seed)
        directory.mkdir(parents=True)
        model = build_model(build_backbone(name, "scratch", 4, False, kwargs), 10, nesting_list)
        classes = tuple(str(digit) for digit in range(10))
        about = (name, kwargs, 4, False, nesting_list, False, classes, 16, 16, data.mean, data.std)
        save_model(model, ModelInfo(*about), directory)
        run = RunConfig(name=directory.name, dir=str(directory.parent), seed=seed)
        config = Config(run=run, data=data, model=ModelConfig(name), head=HeadConfig(nesting_list=list(nesting_list)))
        (directory / "config.yaml").write_text(to_yaml(config))
        return directory

    return make


@pytest.fixture(scope="session")
def saved_run(make_saved_run):
    return make_saved_run()


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Seven smooth pictures of several shapes and modes, as files and as PIL images."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    paths, images = [], []
    for number, size in enumerate([(40, 40), (60, 40), (36, 50), (80, 80), (40, 41), (33, 70), (64, 64)]):
        coarse = Image.fromarray(generator.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        image = coarse.resize(size, Image.Resampling.BICUBIC)
        path = folder / ("deep/er" if number % 2 else "") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = image.convert("L") if number == 3 else image
        image.save(path)
        paths.append(path)
        images.append(image)
    return SimpleNamespace(folder=folder, paths=paths, images=images)
