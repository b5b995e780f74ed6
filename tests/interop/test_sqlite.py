"""The recipe of docs/search.md, run as it stands there."""

import ctypes.util
import functools
import re
import sqlite3
from pathlib import Path

import numpy as np
import pytest

import mrl
from mrl.retrieval.embeddings import EmbeddingMetadata, classes_sha256, write_vectors

sqlite_vec = pytest.importorskip("sqlite_vec", reason="needs sqlite-vec: pip install -r requirements-extras.txt")
SEARCH_MD = Path(__file__).resolve().parents[2] / "docs" / "search.md"


class Connection(sqlite3.Connection):
    def enable_load_extension(self, enabled):
        pass

    def load_extension(self, path):
        pass


@pytest.fixture
def _extensions(monkeypatch):
    """If Python was built without extensions, let SQLite's own library load this one at every connect."""
    if hasattr(sqlite3.Connection, "enable_load_extension"):
        yield
        return
    library = ctypes.CDLL(ctypes.util.find_library("sqlite3"))
    library.sqlite3_auto_extension(
        ctypes.CDLL(str(next(Path(sqlite_vec.__file__).parent.glob("vec0.*")))).sqlite3_vec_init
    )
    monkeypatch.setattr(sqlite3, "connect", functools.partial(sqlite3.connect, factory=Connection))
    yield
    library.sqlite3_reset_auto_extension()


@pytest.fixture
def vectors(tmp_path, monkeypatch):
    """vectors.npy as mrl.embed writes it: 2,000 unit vectors of 80 dims that are never negative."""
    monkeypatch.chdir(tmp_path)
    vectors = np.abs(np.random.default_rng(0).normal(size=(2000, 80)))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    np.save("finished.npy", vectors)
    ids = [f"{i}.jpg" for i in range(2000)]
    metadata = EmbeddingMetadata("", "", "", 0, 0, "", False, classes_sha256(ids))
    write_vectors(Path("finished.npy"), Path("vectors.npy"), ids, metadata)
    return vectors


def test_the_funnel_in_sql_is_ours_and_sign_bits_give_a_shortlist_by_hamming_distance(vectors, _extensions):
    [section] = re.findall(r"## Keep the vectors in SQLite\n(.*?)\n## ", SEARCH_MD.read_text(), re.S)
    blocks = re.findall(r"```python\n(.*?)```", section, re.S)
    names = {}
    exec(blocks[0], names)
    indices, scores = mrl.funnel_search(vectors[:1], vectors, 10, [(80, 200)])
    assert [name for name, _ in names["found"]] == [f"{i}.jpg" for i in indices[0, :10]]
    assert np.allclose([cosine for _, cosine in names["found"]], scores[0, :10], atol=1e-5)
    exact = mrl.exact_search(vectors[:1], vectors, 10, [80])[80][0]
    assert not np.array_equal(exact, indices[:, :10])  # the shortlist matters

    exec(blocks[1], names)
    found = [int(name[:-4]) for name, _ in names["found"]]
    signs, cosines = vectors > vectors.mean(axis=0), vectors @ vectors[0]
    unequal = (signs != signs[0]).sum(axis=1)
    cutoff = np.sort(unequal)[199]  # some of the vectors at this distance are on the shortlist, and all that are nearer
    assert len(found) == 10 and (unequal[found] <= cutoff).all()
    assert cosines[found].tolist() == sorted(cosines[found], reverse=True)
    assert set(np.flatnonzero((unequal < cutoff) & (cosines > cosines[found].min()))) <= set(found)
