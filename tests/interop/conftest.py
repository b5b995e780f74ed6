import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

from mrl.model import build_model, load, save_model


@pytest.fixture(scope="session")
def ff_run(saved_run, tmp_path_factory):
    """`saved_run` as an FF-32 model: of the backbone's 96 numbers the first 32 are trained."""
    run = shutil.copytree(saved_run, tmp_path_factory.mktemp("runs") / "ff")
    model = load(run)
    save_model(build_model(model.backbone, 3, [32]), dataclasses.replace(model.info, nesting_list=(32,)), run)
    killed = json.dumps({"step": 1, "epoch": 1, "top_1/32": 0.5}) + '\n{"step": 2, "lo'
    (run / "metrics.jsonl").write_text(killed)
    return run


@pytest.fixture(scope="session")
def images(saved_run, pictures):
    """The pictures, ready for `encode`."""
    preprocess = load(saved_run).preprocess
    return torch.stack([preprocess(image) for image in pictures.images])


@pytest.fixture(scope="session")
def arrays():
    """Six queries and 300 vectors of any length, never negative as pooled activations are, early coordinates larger."""
    generator = np.random.default_rng(0)
    both = np.abs(generator.normal(size=(306, 32)) / np.sqrt(1 + np.arange(32)) * generator.uniform(0.5, 2, (306, 1)))
    return both[:6].astype(np.float32), both[6:].astype(np.float32)
