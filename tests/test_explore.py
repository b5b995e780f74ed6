"""The page of mrl.explore, in headless Chromium where it is installed."""

import html
import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mrl
from mrl import explore
from mrl.adapt import Map
from mrl.retrieval.embeddings import EmbeddingMetadata, classes_sha256, write_vectors
from tests.conftest import CHROMIUM

N, WIDTH, TRAINED = 40, 24, [6, 24]
QUERY, ZERO = 7, 11


def test_the_slider_of_vectors_cut_below_the_smallest_trained_size_ends_with_all_of_them():
    assert explore.slider_stops([], 8) == [4, 6, 8]
    assert explore.slider_stops([2], 2) == [1, 2]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of forty images in three folders with random vectors, two of which begin with zeros."""
    folder, generator = tmp_path_factory.mktemp("collection"), np.random.default_rng(0)
    ids = [f"{('a', 'é', '<b>')[i % 3]}/{i:02}.png" for i in range(N)]
    for name in ids:
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / "images" / name)
    vectors = generator.normal(size=(N, WIDTH)).astype(np.float32)
    vectors[[ZERO, ZERO + 1], :6] = 0
    np.save(folder / "computed.npy", vectors)
    about = EmbeddingMetadata("0", str(folder / "images"), "v", 20, 20, "", False, classes_sha256(ids))
    about.trained_dims.extend(TRAINED)
    write_vectors(folder / "computed.npy", folder / "v.npy", ids, about)
    assert explore.main(["--vectors", str(folder / "v.npy")]) == 0
    return folder / "explore.html", ids, vectors


def content(path):
    [data] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', path.read_text())
    return json.loads(data)


def shown(path, address, script=""):
    """Return the page as Chromium leaves it: {id of an element: its HTML}, and the neighbors [(name, cosine)]."""
    changed = path.with_name("changed.html")
    changed.write_text(path.read_text().replace("</body>", f"<script>{script}</script></body>"))
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", "--dump-dom"]
    command = [CHROMIUM, *options, f"--user-data-dir={path.parent / 'profile'}", f"{changed.as_uri()}#{address}"]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    grid = re.search(r'<div id="neighbors">(.*?)</div>', dom, re.DOTALL)[1]
    tiles = re.findall(r'data-name="([^"]*)".*?<span[^>]*>([-\d.]+)</span></button>', grid)
    text = {name: html.unescape(inner) for name, inner in re.findall(r'<d[dt] id="(\w+)">(.*?)</d[dt]>', dom)}
    return text, [(html.unescape(name), float(cosine)) for name, cosine in tiles], dom


def nearest(page, query, dim):
    """Search the page's own codes exactly, without the query."""
    path, ids, _ = page
    data = content(path)
    codes = np.frombuffer(explore.base64.b64decode(data["codes"]), np.int8).reshape(N, WIDTH)
    decoded = codes * np.array(data["steps"], np.float32)
    indices, scores = mrl.exact_search(decoded[[query]], decoded, data["k"] + 1, [dim])[dim]
    kept = indices[0] != query
    return [(ids[i], round(float(score), 4)) for i, score in zip(indices[0][kept], scores[0][kept], strict=True)]


@pytest.mark.chromium
def test_the_neighbors_of_a_hash_are_those_of_exact_search_and_so_are_the_counts(page):
    path, ids, _ = page
    text, neighbors, dom = shown(path, f"dims=6&image={ids[QUERY]}")
    expected = nearest(page, QUERY, 6)
    assert [name for name, _ in neighbors] == [name for name, _ in expected] and len(neighbors) == 12
    np.testing.assert_allclose([c for _, c in neighbors], [c for _, c in expected], atol=1e-4)
    kept = {name for name, _ in expected} & {name for name, _ in nearest(page, QUERY, WIDTH)}
    same_folder = [name for name, _ in expected if Path(name).parent == Path(ids[QUERY]).parent]
    assert text["kept"] == f"{len(kept)} of 12" and text["right"] == f"{len(same_folder)} of 12"
    assert (text["dims"], text["of"], text["bytes"], text["share"]) == ("6", "of 24 dims", "6", "bytes per vector, 25%")
    assert dom.count('class="tile kept"') == 2 * len(kept)  # among the neighbors and in the strip below


@pytest.mark.chromium
def test_slider_search_and_click_change_the_neighbors_and_a_zero_prefix_is_said(page):
    path, ids, _ = page
    text, neighbors, dom = shown(path, f"dims=6&image={ids[ZERO]}")
    assert not neighbors and text["kept"] == "0 of 12" and "2 of 40 images are like this" in dom
    script = f"""
        $("text").value = "{ids[QUERY][-6:]}"; $("text").oninput(); $("matches").querySelector("button").click();
        $("size").value = {content(path)["stops"].index(6)}; $("size").dispatchEvent(new Event("input"));
        dispatchEvent(new KeyboardEvent("keydown", {{key: "ArrowRight"}})); $("neighbors").lastChild.click()"""
    text, neighbors, dom = shown(path, f"dims=24&image={ids[ZERO]}", script)
    last = nearest(page, QUERY, 8)[-1][0]
    assert text["dims"] == "8" and re.search(r'<p id="note" hidden', dom)
    assert neighbors[0] == pytest.approx(nearest(page, ids.index(last), 8)[0])


def test_codes_are_within_half_a_step_of_the_vectors_and_agreement_reaches_one(page):
    path, _, vectors = page
    codes, steps = explore.int8_codes(vectors)
    assert codes.dtype == np.int8 and (np.abs(codes * steps - vectors) <= steps * 0.5001).all()
    data = content(path)
    assert data["stops"] == [3, 4, 6, 8, 12, 16, 24] and data["zeros"] == [2, 2, 2, 0, 0, 0, 0]
    found = {dim: [{name for name, _ in nearest(page, i, dim)} for i in range(N)] for dim in (12, WIDTH)}
    shared = sum(len(some & all_) for some, all_ in zip(*found.values(), strict=True))
    assert data["agreement"][4] == pytest.approx(shared / (12 * N)) and data["agreement"][-1] == 1


def test_copies_of_an_image_agree_in_all_of_its_neighbors():
    assert explore.agreement(np.ones((20, 4), np.float32), 12, [2, 4]) == [1, 1]


def test_the_page_asks_for_nothing_and_holds_any_name(page):
    path, ids, _ = page
    text, data = path.read_text(), content(path)
    assert "default-src 'none'; img-src data:" in text
    assert not re.search(r"https?:|@import|url\(|fetch\(|<script[^>]* src=", text)
    assert data["names"] == ids and data["folders"] == ["<b>", "a", "é"]
    assert text.count("</script>") == 2


def test_a_page_is_kept_small_by_a_seeded_choice(page, tmp_path, capsys):
    path, ids, _ = page
    chosen = []
    for out in ("1.html", "2.html"):
        argv = ["--vectors", str(path.with_name("v.npy")), "--max_images", "9", "--out", str(tmp_path / out)]
        assert explore.main(argv) == 0
        assert "9 of 40 images, chosen at random with seed 0" in capsys.readouterr().out
        chosen.append(content(tmp_path / out)["names"])
    assert chosen[0] == chosen[1] == sorted(chosen[0], key=ids.index) and len(set(chosen[0])) == 9


def test_a_map_changes_the_vectors_and_the_sizes_of_the_slider(page, tmp_path):
    path, _, vectors = page
    mapping = Map(np.random.default_rng(1).normal(size=(8, WIDTH)).astype(np.float32), (2, 8))
    mapping.save(tmp_path / "m.safetensors")
    argv = ["--vectors", path.with_name("v.npy"), "--map", tmp_path / "m.safetensors", "--out", tmp_path / "x.html"]
    assert explore.main([str(part) for part in argv]) == 0
    data = content(tmp_path / "x.html")
    steps = np.array(data["steps"])
    codes = np.frombuffer(explore.base64.b64decode(data["codes"]), np.int8).reshape(N, 8)
    assert (np.abs(codes * steps - mapping(vectors)) <= 0.501 * steps).all() and data["trained"] == [2, 8]
