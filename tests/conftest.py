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


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Lists of image files are kept away from the user's own; processes that the tests start inherit this."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
