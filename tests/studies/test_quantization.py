import numpy as np
import pytest

from mrl.results import Source
from mrl.retrieval.quantization import CODES
from mrl.studies.quantization import SECOND_PASS, quantization
from mrl.studies.retrieval import retrieval

pytest.importorskip("faiss")
SOURCE = Source("digits", "mrl", 0, 32, 28, False)
DIMS = (2, 8, 64)


@pytest.fixture(scope="module")
def sets():
    """Ten classes of raw embeddings, the smallest prefix too small for them."""
    rng = np.random.default_rng(0)
    centers = rng.random((10, 64))
    labels = np.arange(40) % 10, np.arange(300) % 10
    queries, database = (
        (centers[of] + 0.3 * rng.random((len(of), 64))) * rng.uniform(0.5, 2, (len(of), 1)) for of in labels
    )
    return queries.astype(np.float32), labels[0], database.astype(np.float32), labels[1]


@pytest.fixture(scope="module")
def rows(sets):
    return quantization(*sets, retrieval(*sets, {"MRL": DIMS}, SOURCE))


def values(rows, metric="top_1"):
    return {(row.code, row.shortlist_size, row.dim): row.value for row in rows if row.metric == metric}


def test_every_code_has_rows_at_every_dim_where_it_is_smaller_than_int8(rows):
    kinds = [("float32", None), *((code, None) for code in CODES)]
    kinds += [(code, length) for code, lengths in SECOND_PASS.items() for length in lengths]
    expected = {(*kind, dim) for kind in kinds for dim in DIMS if dim == 64 or "RaBitQ" not in kind[0]}
    for metric in ("top_1", "map@10"):
        assert values(rows, metric).keys() == expected
    assert len(rows) == 2 * len(expected)
    assert {(row.study, row.method, row.run, row.n) for row in rows} == {("quantization", "MRL", "mrl", 40)}
    assert all(row.rerank_dim == (row.dim if row.shortlist_size else None) for row in rows)


def test_the_values_are_those_of_a_loop_over_rounded_vectors(sets, rows):
    queries, query_labels, database, labels = (np.asarray(part, np.float64) for part in sets)
    for dim in DIMS:
        units = [part[:, :dim] / np.linalg.norm(part[:, :dim], axis=1, keepdims=True) for part in (queries, database)]
        low, high = units[1].min(axis=0), units[1].max(axis=0)
        for code, levels in (("int8", 256), ("4 bits", 16)):
            # A coordinate's range is cut into equal bins, and a value becomes the middle of its own.
            place = np.clip(np.floor((units[1] - low) / (high - low) * (levels - 1)), 0, levels - 1)
            rounded = low + (place + 0.5) / (levels - 1) * (high - low)
            nearest = (units[0] @ rounded.T).argmax(axis=1)
            assert values(rows)[code, None, dim] == pytest.approx((labels[nearest] == query_labels).mean(), abs=0.026)


def test_a_second_pass_over_everything_is_the_search_in_float32_again(sets, rows):
    queries, query_labels, database, labels = sets
    few = (queries, query_labels, database[:200], labels[:200])
    found = values(quantization(*few, retrieval(*few, {"MRL": DIMS}, SOURCE, ks=(10,))), "map@10")
    for dim in DIMS:
        for code in SECOND_PASS:
            assert found[code, 200, dim] == pytest.approx(found["float32", None, dim], abs=2e-3)
    # With a shortlist of 50 of 300 vectors it lies between the code alone and float32, up to chance.
    alone, second, exact = (
        np.mean([values(rows, "map@10")[code, length, dim] for dim in DIMS])
        for code, length in (("sign bits", None), ("sign bits", 50), ("float32", None))
    )
    assert alone + 0.02 < second < exact + 0.01


def test_the_methods_of_one_dim_share_their_codes(sets):
    rows = quantization(*sets, retrieval(*sets, {"FF": [64], "FF truncated": [2, 64]}, SOURCE, ks=(10,)))
    of_ff, truncated = (values([row for row in rows if row.method == method]) for method in ("FF", "FF truncated"))
    assert {dim for *_, dim in truncated} == {2, 64} and {dim for *_, dim in of_ff} == {64}
    assert of_ff == {key: value for key, value in truncated.items() if key[-1] == 64}


@pytest.mark.filterwarnings("ignore:mrl. the database has 6 images")
def test_a_database_of_six_images_has_no_map_at_10_and_no_second_pass(sets):
    queries, query_labels, database, labels = sets
    few = (queries, query_labels, database[:6], labels[:6])
    rows = quantization(*few, retrieval(*few, {"MRL": [8]}, SOURCE))
    assert {(row.metric, row.shortlist_size) for row in rows} == {("top_1", None)}
    assert {row.code for row in rows} == {"float32", "float16", "int8", "4 bits", "sign bits"}
