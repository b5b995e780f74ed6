import sys

import numpy as np
import pytest

import mrl
from mrl.errors import UserError
from mrl.interop import milvus, qdrant
from mrl.interop.faiss import prefix_index


@pytest.fixture(scope="module", params=["qdrant", "milvus"])
def database(request, tmp_path_factory, arrays):
    """A module and its client, whose collection "images" is filled."""
    if request.param == "qdrant":
        module, client = qdrant, pytest.importorskip("qdrant_client").QdrantClient(":memory:")
    else:
        pytest.importorskip("milvus_lite")
        path = str(tmp_path_factory.mktemp("milvus") / "vectors.db")
        module, client = milvus, pytest.importorskip("pymilvus").MilvusClient(path)
    module.upload(client, "images", arrays[1], (8, 16, 32), np.array([f"{i}.jpg" for i in range(300)]))
    yield module, client
    client.close()


@pytest.mark.parametrize("stages", [[(32, 10)], [(16, 40), (32, 10)], [(16, 40)]])
def test_the_funnel_in_a_database_is_ours(stages, database, arrays):
    module, client = database
    indices, scores = module.funnel_search(client, "images", arrays[0], 8, stages)
    last = stages[-1][0]  # coordinates beyond the last size change nothing
    expected, expected_scores = mrl.funnel_search(*(array[:, :last] for array in arrays), 8, stages)
    assert np.array_equal(indices, expected)
    assert np.allclose(scores, expected_scores, atol=1e-5)


def test_names_are_stored_and_impossible_stages_and_sizes_are_refused(database, arrays):
    module, client = database
    if module is qdrant:
        assert client.retrieve("images", [7])[0].payload["id"] == "7.jpg"
    else:
        assert client.get("images", [7], output_fields=["name"])[0]["name"] == "7.jpg"
    with pytest.raises(UserError, match="300"):
        module.funnel_search(client, "images", arrays[0], 8, [(32, 301)])
    with pytest.raises(UserError, match=r"\[64\]; allowed: one or more of 1 to 32"):
        module.upload(client, "others", arrays[1], [64])
    for ids in (["a"], ["a"] * 301):
        with pytest.raises(UserError, match=f"{len(ids)} ids for 300 vectors"):
            module.upload(client, "others", arrays[1], [8], ids)
    module.upload(client, "others", arrays[1], [8])  # nothing of that name was left


def test_in_qdrant_only_the_smallest_dim_has_an_index_and_is_kept_in_memory(arrays):
    client = pytest.importorskip("qdrant_client").QdrantClient(":memory:")
    qdrant.upload(client, "images", arrays[1], (16, 8, 32))
    with pytest.raises(UserError, match="2 ids for 300 vectors"):
        qdrant.upload(client, "others", arrays[1], [8], ["a", "b"])
    params = client.get_collection("images").config.params.vectors
    found = {name: (bool(one.on_disk), one.hnsw_config and one.hnsw_config.m) for name, one in params.items()}
    assert found == {"8": (False, None), "16": (True, 0), "32": (True, 0)}


def test_a_faiss_index_refines_as_our_funnel_does_also_from_a_file(arrays, tmp_path):
    faiss = pytest.importorskip("faiss")
    queries, database = arrays
    index = prefix_index(database, 8, shortlist_factor=4)
    faiss.write_index(index, str(tmp_path / "prefix.faiss"))
    expected, scores = (some[:, :10] for some in mrl.funnel_search(queries, database, 8, [(32, 40)]))
    unit = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    for each in (index, faiss.read_index(str(tmp_path / "prefix.faiss"))):
        found_scores, found = each.search(unit, 10)
        assert np.array_equal(found, expected)
        assert np.allclose(found_scores, scores, atol=1e-5)
        assert np.array_equal(each.search(queries, 10)[1], expected)  # raw queries: the same order
    # The shortlist matters: a search at full width finds others.
    assert not np.array_equal(expected, mrl.exact_search(queries, database, 10, [32])[32][0])
    graph = prefix_index(database, 8, shortlist_factor=4, factory="HNSW32")
    assert np.mean(graph.search(queries, 10)[1] == expected) > 0.8
    small = prefix_index(database, 8, shortlist_factor=4, factory="SQ8", refine="SQfp16")
    assert small.sa_code_size() == 8 + 2 * 32
    assert np.mean(small.search(queries, 10)[1] == expected) > 0.8


def test_faiss_fills_up_with_minus_one_where_it_finds_too_few(arrays):
    pytest.importorskip("faiss")
    queries, database = arrays
    scores, indices = prefix_index(database[:5], 8).search(queries, 7)
    assert (indices[:, 5:] == -1).all() and (scores[:, 5:] < -3e38).all() and (indices[:, :5] >= 0).all()


def test_what_faiss_refuses_is_one_sentence(arrays, monkeypatch):
    pytest.importorskip("faiss")
    database = arrays[1]
    broken = database.copy()
    broken[7, 3] = np.nan
    for vectors, dim, factory, refine, message in (
        (database, 8, "PQ3", "Flat", r"'PQ3' at 8 dims .* 300 vectors \(.* multiple of the number of subquantizers"),
        (database, 8, "IVF1024,Flat", "Flat", r"for 300 vectors \(Number of training points \(300\) should"),
        (database, 8, "Flat", "Half", r"refine 'Half' at 32 .*\(could not parse index string Half\)"),
        (broken, 8, "Flat", "Flat", r"vector 7 holds NaN or infinity"),
        (database, 33, "Flat", "Flat", r"\[33\]; allowed: one or more of 1 to 32"),
    ):
        with pytest.raises(UserError, match=message) as error:
            prefix_index(vectors, dim, factory=factory, refine=refine)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="shortlist_factor is 0.5; allowed: 1 or more"):
        prefix_index(database, 8, shortlist_factor=0.5)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match="pip install faiss-cpu"):
        prefix_index(database, 8)
