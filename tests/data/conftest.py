from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchcodec.encoders import PngEncoder

from mrl.config import DataConfig
from mrl.data.transforms import Transform


@pytest.fixture
def transform():
    return Transform(5, (0.25, 1.0), (3 / 4, 4 / 3), True, 48, 40, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


@pytest.fixture
def image_folder(tmp_path):
    """Make a folder of smooth PNGs: ``{split: {class: number of images}}``."""

    def make(splits, size=(48, 48)):
        generator = np.random.default_rng(3)
        root = tmp_path / "images"
        for split, classes in splits.items():
            for name, count in classes.items():
                (root / split / name).mkdir(parents=True)
                for number in range(count):
                    coarse = torch.from_numpy(generator.uniform(0, 255, (1, 3, 6, 6)))
                    smooth = torch.nn.functional.interpolate(coarse, size, mode="bicubic").clamp(0, 255)
                    PngEncoder(smooth[0].round().to(torch.uint8)).to_file(str(root / split / name / f"{number}.png"))
        return root

    return make


@pytest.fixture
def two_classes(image_folder):
    """A folder of 7 train and 5 validation images, 48 px, and the settings that read it."""
    root = image_folder({"train": {"a": 4, "b": 3}, "val": {"a": 2, "b": 3}})

    def config(**changes):
        settings = {"name": "folder", "root": str(root), "num_workers": 0, "eval_resize_px": 48, "eval_px": 40}
        return DataConfig(**(settings | changes))

    return SimpleNamespace(root=root, config=config)
