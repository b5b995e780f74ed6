import importlib.util
import os
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items):
    shared = Path(os.environ.get("MRL_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    missing = {
        "gpu": None if torch.cuda.is_available() else "needs a CUDA device",
        "ffcv": None if importlib.util.find_spec("ffcv") else "needs FFCV: make ffcv",
        "shared": None if shared.is_dir() else f"needs real images in {shared} (or $MRL_SHARED_DATA)",
    }
    for item in items:
        for marker, reason in missing.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
