import itertools
import json
import os
import shutil
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image

import mrl
from mrl import embed, search
from mrl.adapt import Map
from mrl.data import check
from mrl.data.folder import FolderImages
from mrl.retrieval.embeddings import open_vectors
from mrl.training.frozen import Trunk


def embed_argv(run, pictures, out, *more):
    """``pictures`` is the fixture of that name, or a folder."""
    folder = getattr(pictures, "folder", pictures)
    argv = ["--run", run, "--images", folder, "--out", out, "--num_workers", 0, "--batch_size", 2, *more]
    return [str(part) for part in argv]


@pytest.fixture(scope="module")
def vectors(saved_run, pictures, tmp_path_factory):
    path = tmp_path_factory.mktemp("vectors") / "v.npy"
    assert embed.main(embed_argv(saved_run, pictures, path)) == 0
    return path


@pytest.fixture
def folder(pictures, tmp_path):
    """A copy of the pictures that a test may change."""
    return shutil.copytree(pictures.folder, tmp_path / "images")


def printed_lines(ids, order, scores):
    """Rank, cosine, folder and image of each neighbor, as search prints them."""
    folders = [os.path.basename(os.path.dirname(ids[index])) for index in order]
    longest = max(map(len, folders))
    return [
        f"{rank:>4}  {score:.4f}  {name:<{longest}}  {ids[index]}"
        for rank, (index, score, name) in enumerate(zip(order, scores, folders, strict=True), 1)
    ]


def search_argv(vectors, pictures, *more):
    argv = ["--vectors", vectors, "--image", pictures.paths[2], "--out", vectors.with_name("drawn"), *more]
    return [str(part) for part in argv]


@pytest.mark.parametrize("dim", [16, None])
def test_the_file_holds_what_encode_gives_for_every_image_of_the_folder(dim, make_saved_run, pictures, tmp_path):
    run = make_saved_run("fixed", dims=(32,))  # of 96: no coordinate beyond 32 is trained, nor taken by default
    more = [] if dim is None else ["--dim", dim]
    with pytest.warns(UserWarning, match=r"16 dims were not trained; trained are \[32\]") if dim else nullcontext():
        assert embed.main(embed_argv(run, pictures, tmp_path / "v.npy", *more)) == 0
    found = open_vectors(tmp_path / "v.npy")
    assert sorted(found.ids) == sorted(str(path.relative_to(pictures.folder)) for path in pictures.paths)
    assert (tmp_path / "v.ids.txt").read_text().splitlines() == found.ids
    model = mrl.load(run)
    of_id = dict(zip(pictures.paths, pictures.images, strict=True))
    images = torch.stack([model.preprocess(of_id[pictures.folder / name]) for name in found.ids])
    assert np.allclose(found.vectors, model.encode(images, dim or 32).numpy(), atol=1e-5)
    assert found.metadata.trained_dims == [32]
    assert not (tmp_path / "v.npy.unfinished").exists()


def test_a_killed_pass_goes_on_where_it_stopped(saved_run, pictures, vectors, tmp_path, monkeypatch):
    whole, seen = FolderImages.eval_batches, []

    def killed_after_two_batches(self, indices, flip=False):
        seen.extend(indices)
        yield from itertools.islice(whole(self, indices, flip), 2)
        raise KeyboardInterrupt

    argv = embed_argv(saved_run, pictures, tmp_path / "v.npy")
    with monkeypatch.context() as patch:
        patch.setattr(FolderImages, "eval_batches", killed_after_two_batches)
        assert embed.main(argv) == 130 and not (tmp_path / "v.npy").exists()
        assert embed.main(argv) == 130
    assert [list(batch) for batch in seen] == [[0, 1], [2, 3], [4, 5], [6], [4, 5], [6]]
    assert embed.main(argv) == 0
    assert np.array_equal(np.load(tmp_path / "v.npy"), np.load(vectors))


def test_a_replaced_image_is_embedded_again_and_force_embeds_all(saved_run, folder, tmp_path, monkeypatch, capsys):
    argv = embed_argv(saved_run, folder, tmp_path / "v.npy")
    assert embed.main(argv) == 0
    before = np.load(tmp_path / "v.npy")
    with monkeypatch.context() as patch:
        patch.setattr(embed, "alone_in", None)  # nothing is written: the disk may be read-only
        assert embed.main(argv) == 0
    assert "already holds" in capsys.readouterr().out
    # Two images change places under their names; then one is as large as before, but newer.
    (folder / "0.png").rename(folder / "x")
    (folder / "2.png").rename(folder / "0.png")
    (folder / "x").rename(folder / "2.png")
    assert embed.main(argv) == 0
    after, ids = np.load(tmp_path / "v.npy"), open_vectors(tmp_path / "v.npy").ids
    first, second = ids.index("0.png"), ids.index("2.png")
    np.testing.assert_array_equal(after[[second, first]], before[[first, second]])
    os.utime(folder / "0.png", ns=(0, 1))
    capsys.readouterr()
    for more in ([], ["--force"]):
        assert embed.main([*argv, *more]) == 0
        assert "7 images x 96 dims" in capsys.readouterr().out


def test_a_shorter_file_replaces_a_longer_one_and_is_searched_up_to_its_size(saved_run, pictures, tmp_path, capsys):
    path = tmp_path / "v.npy"
    for dim in (96, 16):
        assert embed.main(embed_argv(saved_run, pictures, path, "--dim", dim)) == 0
    assert open_vectors(path).vectors.shape == (7, 16)
    capsys.readouterr()
    assert search.main(search_argv(path, pictures)) == 0
    printed = capsys.readouterr().out
    assert "at 8 dims" in printed and "at 16 dims" in printed and "at 32 dims" not in printed
    assert search.main(search_argv(path, pictures, "--dims", 8, 32)) == 2
    assert "--dims asks for 32, but the vectors" in capsys.readouterr().err


def test_what_cannot_be_embedded_is_named_and_nothing_is_written(saved_run, folder, tmp_path, capsys):
    np.save(tmp_path / "mine.npy", np.zeros(3))
    (tmp_path / "coco.json").write_text('{"images": []}')
    (tmp_path / "empty").mkdir()
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "letter.jpg").write_text("Dear reader")
    (tmp_path / "poems").mkdir()
    (tmp_path / "poems" / "two\nlines.jpg").write_text("")
    for argv, message in (
        (embed_argv(saved_run, folder, tmp_path / "mine.npy"), "mine.npy exists and was not written by this tool"),
        (embed_argv(saved_run, folder, tmp_path / "coco.npy"), "coco.json exists and was not written by this tool"),
        (embed_argv(saved_run, folder, tmp_path / "v.npy", "--dim", 97), "97 dims of an embedding of width 96"),
        (embed_argv(saved_run, tmp_path / "letters", tmp_path / "v.npy"), "letter.jpg cannot be read as an image"),
        (embed_argv(saved_run, tmp_path / "poems", tmp_path / "v.npy"), "two\\nlines.jpg' has a line break; rename it"),
        (embed_argv(saved_run, tmp_path / "nowhere", tmp_path / "v.npy"), "is not a folder"),
        (embed_argv(saved_run, tmp_path / "empty", tmp_path / "v.npy"), "holds no images"),
        (embed_argv("someone/small", folder, tmp_path / "v.npy"), "someone/small has no model.json"),
    ):
        assert embed.main(argv) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("v.json")) and not list(tmp_path.glob("v.npy"))
    assert (tmp_path / "coco.json").read_text() == '{"images": []}'


def test_search_prints_and_draws_the_neighbors_of_every_size(saved_run, pictures, vectors, capsys):
    assert search.main(search_argv(vectors, pictures, "--k", 3)) == 0
    printed = capsys.readouterr().out
    model, stored = mrl.load(saved_run), open_vectors(vectors)
    query = model.preprocess(pictures.images[2])[None]
    for dim in (8, 16, 32, 96):
        cosines = mrl.unit_prefix(torch.tensor(np.array(stored.vectors)), dim) @ model.encode(query, dim)[0]
        scores, order = cosines.topk(3)
        lines = printed_lines(stored.ids, order, scores)
        assert "\n".join([f"{pictures.paths[2]} at {dim} dims", *lines]) in printed
        assert lines[0].split() == ["1", "1.0000", "2.png"]  # the query itself
    for suffix in (".png", ".pdf"):
        assert vectors.with_name(f"drawn{suffix}").stat().st_size > 1000


def test_the_query_is_left_out_on_request_wherever_it_lies(pictures, vectors, folder, tmp_path, capsys):
    found = []
    (folder / "2.png").rename(tmp_path / "real.png")
    (folder / "2.png").symlink_to(tmp_path / "real.png")
    linked = ["--exclude_query", "--images", folder, "--image", folder / "2.png"]
    twin = shutil.copy(pictures.paths[2], tmp_path / "copy.png")  # not among the vectors, so its twin is found
    for more in ([], ["--exclude_query"], ["--exclude_query", "--image", twin], linked):
        assert search.main(search_argv(vectors, pictures, "--dims", 96, "--k", 7, *more)) == 0
        printed = capsys.readouterr().out.splitlines()
        found.append([line.split()[-1] for line in printed if line.startswith("   ")])
    assert len(found[0]) == 7 and found[0][0] == "2.png" and found[2] == found[0]
    assert found[1] == found[3] == found[0][1:]


def test_all_zero_prefixes_are_counted_and_have_no_neighbors(saved_run, pictures, tmp_path, monkeypatch, capsys):
    forward = Trunk.forward

    def partly_zero(self, batch):
        vectors = forward(self, batch)
        vectors[batch.std(dim=(1, 2, 3)) < batch.std(dim=(1, 2, 3)).mean(), :8] = 0
        return vectors

    monkeypatch.setattr(Trunk, "forward", partly_zero)
    argv = embed_argv(saved_run, pictures, tmp_path / "v.npy", "--batch_size", 7)
    assert embed.main(argv) == 0
    stored = open_vectors(tmp_path / "v.npy")
    zero = {name for name, vector in zip(stored.ids, stored.vectors, strict=True) if not vector[:8].any()}
    counted = f"all-zero prefixes: {len(zero)} at 8 dims, of 7 images"
    assert 0 < len(zero) < 7 and counted in capsys.readouterr().out
    assert search.main(search_argv(tmp_path / "v.npy", pictures, "--dims", 8, "--k", 7)) == 0
    found = [line.split()[-1] for line in capsys.readouterr().out.splitlines() if line.startswith("   ")]
    assert set(found) == set(stored.ids) - zero
    encode_query = search.encode_query
    monkeypatch.setattr(search, "encode_query", lambda *args: encode_query(*args) * (np.arange(96) >= 8))
    assert search.main(search_argv(tmp_path / "v.npy", pictures, "--dims", 8, 96)) == 0
    printed = capsys.readouterr().out
    assert counted in printed and "at 8 dims: its prefix is all zero, so it has no neighbors\n" in printed


def test_a_map_is_applied_to_the_vectors_and_to_the_query(saved_run, pictures, vectors, tmp_path, capsys):
    mapping = Map(np.random.default_rng(0).normal(size=(24, 96)).astype(np.float32), (12, 24))
    mapping.save(tmp_path / "map.safetensors")
    assert search.main(search_argv(vectors, pictures, "--map", tmp_path / "map.safetensors")) == 0
    printed, stored = capsys.readouterr().out, open_vectors(vectors)
    query = mrl.load(saved_run).encode(mrl.load(saved_run).preprocess(pictures.images[2])[None])
    for dim in (12, 24):
        both = [mrl.unit_prefix(torch.from_numpy(mapping(given)), dim) for given in (stored.vectors, query)]
        scores, order = (both[0] @ both[1][0]).topk(6)
        lines = printed_lines(stored.ids, order, scores)
        assert "\n".join([f"{pictures.paths[2]} at {dim} dims", *lines]) in printed


def test_search_refuses_vectors_that_do_not_fit(make_saved_run, pictures, vectors, tmp_path, capsys):
    other = make_saved_run("other", stem_stride=2)
    np.save(tmp_path / "v.npy", np.zeros((7, 96), np.float32))
    (tmp_path / "v.ids.txt").write_text("a.png\n" * 7)
    shutil.copy(vectors.with_suffix(".json"), tmp_path / "v.json")
    for path, more, message in (
        (vectors, ["--run", other], "made by other weights"),
        (vectors, ["--run", tmp_path / "gone"], "does not exist; give its new place with --run"),
        (vectors, ["--image", vectors], "cannot be read as an image"),
        (vectors, ["--images", tmp_path / "gone"], "give the folder that holds them now: --images DIR"),
        (vectors, ["--map", pictures.paths[0]], "cannot be read as a map"),
        (tmp_path / "v.npy", [], "do not belong together"),
        (tmp_path / "w.npy", [], "cannot be read as vectors"),
    ):
        assert search.main(search_argv(path, pictures, *more)) == 2
        assert message in capsys.readouterr().err


def test_names_that_are_not_utf_8_are_embedded_found_and_printed(saved_run, folder, capsys):
    folder = folder.rename(folder.with_name(os.fsdecode(b"caf\xe9")))
    name = os.fsdecode(b"\xe9/\xff.png")  # search draws the name of the folder
    (folder / name).parent.mkdir()
    (folder / "2.png").rename(folder / name)
    assert embed.main(embed_argv(saved_run, folder, folder / "v.npy")) == 0
    assert name in open_vectors(folder / "v.npy").ids
    assert search.main(["--vectors", str(folder / "v.npy"), "--image", str(folder / name), "--dims", "96"]) == 0
    printed = capsys.readouterr().out
    assert "1  1.0000  \\udce9 " in printed and " \\udce9/\\udcff.png\n" in printed
    (folder / name).write_bytes(b"")
    assert check.main([str(folder)]) == 1
    assert "caf\\udce9/\\udce9/\\udcff.png cannot be read" in capsys.readouterr().out


def test_folders_of_tools_and_unreadable_images_are_left_out_and_counted(saved_run, pictures, folder, tmp_path, capsys):
    shutil.copytree(pictures.folder, folder / "deep" / "@eaDir")
    (folder / "5.png").write_bytes(b"")
    argv = embed_argv(saved_run, folder, tmp_path / "v.npy")
    assert embed.main([*argv, "--max_unreadable", "0.1"]) == 2
    assert f"1 of 8 {folder} images cannot be read" in capsys.readouterr().err
    assert embed.main([*argv, "--max_unreadable", "0.2"]) == 0
    printed = capsys.readouterr()
    assert "7 images x 96 dims" in printed.out and f"{folder}/5.png cannot be read" in printed.err
    assert "left out: 1 folders of tools (@eaDir), 1 images that cannot be read" in printed.out
    assert "5.png" not in open_vectors(tmp_path / "v.npy").ids


def test_a_rotated_photograph_finds_its_upright_twin_if_the_model_says_so(make_saved_run, tmp_path):
    run = make_saved_run("upright")
    about = json.loads((run / "model.json").read_text())
    (tmp_path / "photos").mkdir()
    exif = Image.Exif()
    exif[0x112] = 6
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((48, 48))
    upright.save(tmp_path / "photos" / "upright.png")
    upright.rotate(90).save(tmp_path / "photos" / "rotated.png", exif=exif)
    cosines = {}
    for rule in ("apply", "ignore"):
        (run / "model.json").write_text(json.dumps(about | {"exif_rotation": rule}))
        assert embed.main(embed_argv(run, tmp_path / "photos", tmp_path / f"{rule}.npy")) == 0
        rotated, other = np.load(tmp_path / f"{rule}.npy")
        cosines[rule] = rotated @ other
    assert cosines["apply"] > 0.9999 > cosines["ignore"]
