import sys

import numpy as np
import pytest

from mrl.retrieval.quantization import CODES, empty_index, faiss_installed, search_coded

pytest.importorskip("faiss")


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)).astype(np.float32)


def coded_index(code, vectors):
    index = empty_index(code, vectors.shape[1])
    index.train(vectors)
    index.add(vectors)
    return index


@pytest.fixture(scope="module")
def arrays():
    """Queries and a database; positive and off the origin, like pooled activations."""
    rng = np.random.default_rng(0)
    return unit(rng.random((20, 24)) ** 2), unit(rng.random((500, 24)) ** 2)


@pytest.mark.parametrize("dim", [3, 8, 24])
def test_bytes_are_those_of_the_bits_and_of_what_rabitq_adds_per_vector(dim):
    counted = {code: empty_index(code, dim).sa_code_size() for code in CODES}
    in_bits = {"float16": 16, "int8": 8, "4 bits": 4, "sign bits": 1}
    assert {code: counted[code] for code in in_bits} == {code: -(-bits * dim // 8) for code, bits in in_bits.items()}
    # RaBitQ keeps two floats beside the bits; with more than one bit, three more for the second estimate.
    assert counted["RaBitQ, 1 bit"] == -(-dim // 8) + 8
    assert counted["RaBitQ, 4 bits"] == -(-dim // 8) + 12 + -(-3 * dim // 8) + 8


@pytest.mark.parametrize("code", CODES)
def test_the_search_is_that_of_the_index(arrays, code):
    queries, database = arrays
    index = coded_index(code, database)
    found, expected = search_coded(index, queries, 10), index.search(queries, 10)[1]
    assert found.dtype == np.int64 and (found == expected).mean() > 0.99  # scores that are equal up to rounding


@pytest.mark.parametrize("code", CODES)
def test_degenerate_vectors_have_neighbors_too(arrays, code):
    constant_coordinate = np.pad(arrays[1], ((0, 0), (0, 1)))
    equal, zero = np.full((300, 8), 8**-0.5, np.float32), np.zeros((300, 8), np.float32)
    for vectors in (constant_coordinate, equal, zero, arrays[1][:2]):
        k = min(10, len(vectors))
        found = search_coded(coded_index(code, vectors), vectors[:5], k)
        assert all(len(set(row)) == k and min(row) >= 0 for row in found.tolist())


def test_without_faiss_one_line_says_what_is_left_out(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "faiss", None)
    faiss_installed.cache_clear()
    assert not faiss_installed() and not faiss_installed()
    [line] = capsys.readouterr().err.splitlines()
    assert "quantization" in line and "pip install faiss-cpu" in line
    faiss_installed.cache_clear()
