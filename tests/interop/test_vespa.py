"""The Vespa application: its files, and the ranks of its profiles by an evaluator of their expressions in numpy."""

import json
import re
import struct
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

import mrl
from mrl.errors import UserError
from mrl.interop import vespa

package = pytest.importorskip("vespa.package", reason="needs pyvespa: pip install -r requirements-extras.txt")
GOLDEN = Path(__file__).with_name("vespa")
CODES = ("float32", "sign bits")


@pytest.fixture(scope="module", params=CODES)
def application(request, arrays, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vespa")
    vespa.write_application(folder, arrays[1], 8, np.array([f"{i}.jpg" for i in range(300)]), request.param)
    return request.param, folder


def read_tensor(kind, digits):
    """Read hexadecimal digits as Vespa does: of float cells the bits, of int8 cells the bytes."""
    if "int8" in kind:
        return np.array(struct.unpack(f"{len(digits) // 2}b", bytes.fromhex(digits)), np.int8)
    cells = [struct.unpack("=f", struct.pack("=I", int(digits[i : i + 8], 16)))[0] for i in range(0, len(digits), 8)]
    return np.array(cells, np.float32)


def answer(folder, body):
    """Return the documents and relevances that Vespa's documentation promises, if its HNSW index finds all."""
    schema = (folder / "application/schemas/image.sd").read_text()
    kinds = dict(re.findall(r"field (\w+) type (tensor\S+) ", schema))
    metrics = dict(re.findall(r"field (\w+) type tensor.*?distance-metric: (\S+)", schema, re.S))
    [profile] = re.findall(rf"rank-profile {body['ranking.profile']} {{(.*?)\n    }}", schema, re.S)
    phases = re.findall(r"-phase {\s+expression {\s+(.*?)\n", profile)
    declared = dict(re.findall(r"query\((\w+)\) (tensor\S+)", profile))
    queries = {name: np.array(body[f"input.query({name})"]) for name in declared}
    assert all(f"(x[{len(queries[name])}])" in kind for name, kind in declared.items())
    target_hits, field, query = re.search(r"targetHits:(\d+)}nearestNeighbor\((\w+), (\w+)\)", body["yql"]).groups()
    lines = [json.loads(line) for line in (folder / "feed.jsonl").read_text().splitlines()]
    documents = [
        {name: read_tensor(kind, line["fields"][name]["values"]) for name, kind in kinds.items()} for line in lines
    ]

    def distance(document):
        one, other = queries[query], document[field]
        if metrics[field] == "hamming":
            return sum(bin((a ^ b) & 255).count("1") for a, b in zip(one.tolist(), other.tolist(), strict=True))
        return np.arccos(np.clip(one @ other / np.linalg.norm(one) / np.linalg.norm(other), -1, 1))

    def score(expression, document):
        names = {name: name for name in ("field", "x", *kinds, *queries)} | {
            "closeness": lambda _, name: {field: 1 / (1 + distance(document))}[name],
            "query": queries.__getitem__,
            "attribute": document.__getitem__,
            "unpack_bits": lambda cells: np.unpackbits(cells.view(np.uint8)).astype(np.float32),
            "cosine_similarity": lambda a, b, _: a @ b / np.sqrt((a @ a) * (b @ b)),
            "sum": np.sum,
        }
        return eval(expression, {}, names)

    hits = [(score(phases[0], document), i) for i, document in enumerate(documents)]
    hits = sorted(hits, key=lambda hit: (-hit[0], hit[1]))[: int(target_hits)]
    if len(phases) == 2:
        hits = [(score(phases[1], documents[i]), i) for _, i in hits[: body["ranking.rerankCount"]]]
        hits.sort(key=lambda hit: (-hit[0], hit[1]))
    return [i for _, i in hits[: body["hits"]]]


def test_the_profiles_rank_as_our_searches_do(application, arrays):
    code, folder = application
    queries, database = arrays
    expected = {
        "exact": mrl.exact_search(queries, database, 10, [32])[32][0],
        "prefix": mrl.exact_search(queries, database, 10, [8])[8][0],
        "rerank": mrl.funnel_search(queries, database, 8, [(32, 40)])[0][:, :10],
    }
    assert not np.array_equal(expected["rerank"], expected["exact"])  # the shortlist matters
    if code == "sign bits":
        # The slow way: signs of the centered prefixes as -1 and 1, and the Hamming distance as unequal signs.
        units = [x[:, :8] / np.linalg.norm(x[:, :8], axis=1, keepdims=True) for x in arrays]
        unit_queries, unit_database = (unit - units[1].mean(axis=0) for unit in units)
        signs = np.where(unit_database > 0, 1.0, -1.0)
        unequal = (np.where(unit_queries > 0, 1.0, -1.0)[:, None] != signs).sum(axis=2)
        shortlist = np.argsort(unequal, axis=1, kind="stable")[:, :40]
        products = np.take_along_axis(unit_queries @ signs.T, shortlist, axis=1)
        order = np.lexsort((shortlist, -products.round(6)))  # of equal products the lower index, as the evaluator
        expected["prefix"] = np.take_along_axis(shortlist, order, axis=1)[:, :10]
        expected["rerank"] = mrl.rerank(queries, database, shortlist, 32)[:, :10]
    for profile, ranks in expected.items():
        bodies = [vespa.query_body(folder, query, 10, profile, shortlist_size=40) for query in queries]
        assert [answer(folder, body) for body in bodies] == ranks.tolist(), profile


def lines_of(text):
    return [line.strip() for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("code", CODES)
def test_the_files_are_the_golden_ones(code, tmp_path):
    # The lengths of the prefixes are 4 and 2, so that nothing is rounded.
    vectors = np.array([[2, -2, 0, 0, 2, 2, 0, 0, *range(8)], [0, 0, -1, 1, 0, 0, 1, 1, *range(8)]], np.float32)
    vespa.write_application(tmp_path, vectors, 8, ["a.jpg", "b/ü.jpg"], code)
    golden = GOLDEN / code.replace(" ", "_")
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {"application/schemas/image.sd", "application/services.xml", "feed.jsonl", "query.json"}
    for name in ("application/schemas/image.sd", "feed.jsonl", "query.json"):
        assert lines_of((tmp_path / name).read_text()) == lines_of((golden / Path(name).name).read_text()), name
    body = vespa.query_body(tmp_path, vectors[0], 1)
    assert body == json.loads((golden / "body.json").read_text())


def test_services_xml_follows_the_grammar_of_vespa(application):
    from vespa.configuration.relaxng import RELAXNG
    from vespa.configuration.services import validate_services

    path = application[1] / "application/services.xml"
    assert [element.get("type") for element in ElementTree.parse(path).iter("document")] == ["image"]
    assert not RELAXNG or validate_services(path)  # some versions of pyvespa were packed without the grammar


def test_wrong_arguments_are_one_sentence(application, arrays, tmp_path, monkeypatch):
    queries, database = arrays
    broken = database.copy()
    broken[7, 30] = np.nan
    for vectors, dim, code, message in (
        (database, 33, "float32", "33 dims of an embedding of width 32"),
        (database, 12, "sign bits", "if prefix_dim is a multiple of 8"),
        (broken, 8, "float32", "vector 7 holds NaN or infinity"),
    ):
        with pytest.raises(UserError, match=message):
            vespa.write_application(tmp_path, vectors, dim, code=code)
    with pytest.raises(UserError, match="2 ids for 300 vectors"):
        vespa.write_application(tmp_path, database, 8, ["a", "b"])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    with pytest.raises(UserError, match=r"the query is \(8,\); allowed: \(32,\)"):
        vespa.query_body(application[1], queries[0][:8])
    with pytest.raises(UserError, match="without NaN or infinity"):
        vespa.query_body(application[1], broken[7])
    with pytest.raises(UserError, match="profile is 'reranked'; allowed: exact, prefix, rerank"):
        vespa.query_body(application[1], queries[0], profile="reranked")
    with pytest.raises(UserError, match="k is 101; allowed: 1 to the smaller"):
        vespa.query_body(application[1], queries[0], k=101)
    monkeypatch.setitem(sys.modules, "vespa.package", None)
    with pytest.raises(UserError, match="pip install pyvespa"):
        vespa.write_application(tmp_path, database, 8)
