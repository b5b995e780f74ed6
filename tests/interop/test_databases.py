import sys

import numpy as np
import pytest

import mrl
from mrl.errors import UserError
from mrl.interop import milvus, qdrant
from mrl.interop.faiss import prefix_index

DIMS = (8, 16, 32)
STAGES = [(16, 40), (32, 10)]


@pytest.fixture(scope="module")
def arrays():
    """Queries and a database with random lengths, early coordinates larger, as embeddings of a trained model have."""
    generator = np.random.default_rng(0)
    scale = 1 / np.sqrt(1 + np.arange(32))
    both = generator.normal(size=(306, 32)) * scale * generator.uniform(0.5, 2, (306, 1))
    return both[:6].astype(np.float32), both[6:].astype(np.float32)


@pytest.fixture(scope="module")
def collections(tmp_path_factory, arrays):
    """``make(name)``: the module of a database and a client, its collection "images" filled."""
    made = {}

    def make(name):
        if name not in made:
            if name == "qdrant":
                module = qdrant
                client = pytest.importorskip("qdrant_client", reason="needs qdrant-client").QdrantClient(":memory:")
            else:
                module = milvus
                pytest.importorskip("milvus_lite", reason="needs milvus-lite")
                library = pytest.importorskip("pymilvus", reason="needs pymilvus")
                client = library.MilvusClient(str(tmp_path_factory.mktemp("milvus") / "vectors.db"))
            module.upload(client, "images", arrays[1], DIMS, [f"{row}.jpg" for row in range(300)])
            made[name] = module, client
        return made[name]

    yield make
    for _, client in made.values():
        client.close()


@pytest.mark.parametrize("name", ["qdrant", "milvus"])
@pytest.mark.parametrize("stages", [[(32, 10)], STAGES, [(16, 40), (32, 40)]])
def test_the_funnel_in_a_database_is_ours(name, stages, collections, arrays):
    module, client = collections(name)
    indices, scores = module.funnel_search(client, "images", arrays[0], 8, stages)
    expected, of_expected = mrl.funnel_search(*arrays, 8, stages)
    assert np.array_equal(indices, expected)
    assert np.allclose(scores, of_expected, atol=1e-5)


@pytest.mark.parametrize("name", ["qdrant", "milvus"])
def test_sizes_that_are_not_stored_and_impossible_stages_are_refused(name, collections, arrays):
    module, client = collections(name)
    with pytest.raises(UserError, match="dims; it holds|has no column dim_24"):
        module.funnel_search(client, "images", arrays[0], 8, [(24, 10)])
    for stages in ([(32, 301)], [(16, 10), (32, 20)]):
        with pytest.raises(UserError, match="do not grow and lie between 1 and the 300"):
            module.funnel_search(client, "images", arrays[0], 8, stages)
    with pytest.raises(UserError, match="1 to 32"):
        module.upload(client, "others", arrays[1], [64])


def test_names_come_with_the_points(collections):
    _, client = collections("qdrant")
    assert [point.payload["id"] for point in client.retrieve("images", [7, 299])] == ["7.jpg", "299.jpg"]
    _, client = collections("milvus")
    assert client.get("images", [7], output_fields=["name"])[0]["name"] == "7.jpg"


def test_a_faiss_index_of_prefixes_refines_as_our_funnel_does_also_from_a_file(arrays, tmp_path):
    faiss = pytest.importorskip("faiss", reason="needs faiss-cpu")
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
    # It is the shortlist that decides: full width alone finds others.
    assert not np.array_equal(expected, mrl.exact_search(queries, database, 10, [32])[32][0])
    graph = prefix_index(database, 8, shortlist_factor=4, factory="HNSW32")
    assert np.mean(graph.search(queries, 10)[1] == expected) > 0.8


def test_wrong_faiss_settings_and_absent_extras_are_said(arrays, monkeypatch):
    pytest.importorskip("faiss", reason="needs faiss-cpu")
    for settings, message in (
        ({"shortlist_dim": 33}, "width 32 allow 1 to 32"),
        ({"shortlist_dim": 8, "shortlist_factor": 0.5}, "allowed: 1 or more"),
        ({"shortlist_dim": 8, "factory": "Tree"}, "'Tree' is not an index that FAISS knows"),
    ):
        with pytest.raises(UserError, match=message):
            prefix_index(arrays[1], **settings)
    for package in ("faiss", "qdrant_client", "pymilvus"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match="pip install faiss-cpu"):
        prefix_index(arrays[1], 8)
    for module, packages in ((qdrant, "qdrant-client"), (milvus, "pymilvus milvus-lite")):
        with pytest.raises(UserError, match=f"pip install {packages}"):
            module.upload(None, "images", arrays[1], DIMS)
