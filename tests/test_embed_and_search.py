import json
import os
import shutil

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
    argv = ["--run", run, "--images", pictures.folder, "--out", out, "--num_workers", 0, "--batch_size", 2, *more]
    return [str(part) for part in argv]


@pytest.fixture(scope="module")
def vectors(saved_run, pictures, tmp_path_factory):
    path = tmp_path_factory.mktemp("vectors") / "v.npy"
    assert embed.main(embed_argv(saved_run, pictures, path)) == 0
    return path


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


@pytest.mark.parametrize("dim", [16, 96])
def test_the_file_holds_what_encode_gives_for_every_image_of_the_folder(dim, saved_run, pictures, tmp_path):
    assert embed.main(embed_argv(saved_run, pictures, tmp_path / "v.npy", "--dim", dim)) == 0
    found = open_vectors(tmp_path / "v.npy")
    assert sorted(found.ids) == sorted(str(path.relative_to(pictures.folder)) for path in pictures.paths)
    assert (tmp_path / "v.ids.txt").read_text().splitlines() == found.ids
    model = mrl.load(saved_run)
    of_id = dict(zip(pictures.paths, pictures.images, strict=True))
    images = torch.stack([model.preprocess(of_id[pictures.folder / name]) for name in found.ids])
    assert np.allclose(found.vectors, model.encode(images, dim).numpy(), atol=1e-5)
    assert not (tmp_path / "v.npy.unfinished").exists()


def test_a_killed_pass_goes_on_where_it_stopped(saved_run, pictures, vectors, tmp_path, monkeypatch):
    whole = FolderImages.eval_batches
    seen = []

    def killed_after_two_batches(self, indices, flip=False):
        for number, batch in enumerate(whole(self, indices, flip)):
            if number == 2:
                raise KeyboardInterrupt
            yield batch

    def counted(self, indices, flip=False):
        seen.extend(int(index) for some in indices for index in some)
        return whole(self, indices, flip)

    argv = embed_argv(saved_run, pictures, tmp_path / "v.npy")
    monkeypatch.setattr(FolderImages, "eval_batches", killed_after_two_batches)
    assert embed.main(argv) == 130
    assert not (tmp_path / "v.npy").exists()
    monkeypatch.setattr(FolderImages, "eval_batches", counted)
    assert embed.main(argv) == 0
    assert sorted(seen) == [4, 5, 6]  # two batches of two were there already
    assert np.array_equal(np.load(tmp_path / "v.npy"), np.load(vectors))
    assert embed.main(argv) == 0 and len(seen) == 3  # nothing is left to do


def test_a_replaced_image_is_embedded_again_and_force_embeds_all(saved_run, pictures, tmp_path, capsys):
    folder = shutil.copytree(pictures.folder, tmp_path / "images")
    argv = [*embed_argv(saved_run, pictures, tmp_path / "v.npy"), "--images", str(folder)]
    assert embed.main(argv) == 0
    before = np.load(tmp_path / "v.npy")
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


def test_vectors_of_another_size_are_replaced_but_a_foreign_file_is_not(saved_run, pictures, tmp_path, capsys):
    np.save(tmp_path / "mine.npy", np.zeros(3))
    assert embed.main(embed_argv(saved_run, pictures, tmp_path / "mine.npy")) == 2
    assert "mine.npy exists and was not written by this tool" in capsys.readouterr().err
    for dim in (8, 16):
        assert embed.main(embed_argv(saved_run, pictures, tmp_path / "v.npy", "--dim", dim)) == 0
    assert open_vectors(tmp_path / "v.npy").vectors.shape == (7, 16)


def test_sizes_that_were_not_trained_warn_and_larger_ones_are_refused(saved_run, pictures, tmp_path, capsys):
    with pytest.warns(UserWarning, match=r"12 dims were not trained; trained are \[8, 16, 32, 96\]"):
        assert embed.main(embed_argv(saved_run, pictures, tmp_path / "v.npy", "--dim", 12)) == 0
    assert embed.main(embed_argv(saved_run, pictures, tmp_path / "w.npy", "--dim", 97)) == 2
    assert "--dim is 97; allowed: 1 to 96" in capsys.readouterr().err
    assert embed.main(embed_argv(saved_run, pictures, tmp_path / "w.npy", "--dim", 0)) == 2
    assert not list(tmp_path.glob("w.*"))


def test_an_image_that_is_none_is_named(saved_run, pictures, tmp_path, capsys):
    folder = shutil.copytree(pictures.folder, tmp_path / "images")
    (folder / "letter.jpg").write_text("Dear reader")
    assert embed.main([*embed_argv(saved_run, pictures, tmp_path / "v.npy"), "--images", str(folder)]) == 2
    assert f"{folder / 'letter.jpg'} cannot be read as an image" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    for wrong, message in (("nowhere", "is not a folder"), ("empty", "holds no images")):
        argv = [*embed_argv(saved_run, pictures, tmp_path / "v.npy"), "--images", str(tmp_path / wrong)]
        assert embed.main(argv) == 2
        assert message in capsys.readouterr().err


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


def test_the_query_is_left_out_on_request_wherever_it_lies(pictures, vectors, capsys):
    argv = search_argv(vectors, pictures, "--dims", 96, "--k", 7)
    assert search.main(argv) == 0 and search.main([*argv, "--exclude_query"]) == 0
    whole, without = (part.splitlines() for part in capsys.readouterr().out.split(f"{pictures.paths[2]} at ")[1:])
    names = [[line.split()[-1] for line in lines if "  " in line] for lines in (whole, without)]
    assert len(names[0]) == 7 and names[1] == [name for name in names[0] if name != "2.png"]
    argv = ["--vectors", str(vectors), "--image", str(pictures.paths[2].with_name("copy.png")), "--exclude_query"]
    shutil.copy(pictures.paths[2], argv[3])  # not among the vectors, so its twin is found
    try:
        assert search.main(argv) == 0
    finally:
        os.remove(argv[3])
    assert "1  1.0000      2.png" in capsys.readouterr().out


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
    encode_query = search.encode_query
    monkeypatch.setattr(search, "encode_query", lambda *args: encode_query(*args) * (np.arange(96) >= 8))
    for k in (1, 7):
        assert search.main(search_argv(tmp_path / "v.npy", pictures, "--dims", 8, 96, "--k", k)) == 0
        printed = capsys.readouterr().out
        assert counted in printed and "at 8 dims: its prefix is all zero, so it has no neighbors\n" in printed
    monkeypatch.setattr(search, "encode_query", encode_query)
    assert search.main(search_argv(tmp_path / "v.npy", pictures, "--dims", 8, "--k", 7)) == 0
    found = [line.split()[-1] for line in capsys.readouterr().out.splitlines() if line.startswith("   ")]
    assert set(found) == set(stored.ids) - zero


def test_a_shorter_file_is_searched_up_to_its_size(saved_run, pictures, tmp_path, capsys):
    path = tmp_path / "v.npy"
    assert embed.main(embed_argv(saved_run, pictures, path, "--dim", 16)) == 0
    assert search.main(search_argv(path, pictures)) == 0
    printed = capsys.readouterr().out
    assert "at 8 dims" in printed and "at 16 dims" in printed and "at 32 dims" not in printed
    assert search.main(search_argv(path, pictures, "--dims", 8, 32)) == 2
    assert "--dims asks for 32, but the vectors" in capsys.readouterr().err


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
    assert search.main(search_argv(vectors, pictures, "--map", pictures.paths[0])) == 2
    assert "cannot be read as a map" in capsys.readouterr().err


def test_search_refuses_vectors_that_do_not_fit(saved_run, make_saved_run, pictures, vectors, tmp_path, capsys):
    def error_of(path, *more):
        assert search.main(search_argv(path, pictures, *more)) == 2
        return capsys.readouterr().err

    other = make_saved_run("other", stem_stride=2)
    assert "made by other weights" in error_of(vectors, "--run", other)
    assert "does not exist; give its new place with --run" in error_of(vectors, "--run", tmp_path / "gone")
    assert "cannot be read as an image" in error_of(vectors, "--image", vectors)
    assert "cannot be read as an image" in error_of(vectors, "--images", tmp_path)
    np.save(tmp_path / "v.npy", np.zeros((7, 96), np.float32))
    assert "cannot be read as vectors" in error_of(tmp_path / "v.npy")
    (tmp_path / "v.ids.txt").write_text("a.png\n" * 7)
    assert "do not belong together" in error_of(tmp_path / "v.npy")
    shutil.copy(vectors.with_suffix(".json"), tmp_path / "v.json")
    assert "do not belong together" in error_of(tmp_path / "v.npy")


def test_the_default_is_the_largest_trained_size_and_no_coordinate_beyond(pictures, tmp_path, make_saved_run):
    run = make_saved_run("fixed", dims=(16,))
    assert embed.main(embed_argv(run, pictures, tmp_path / "v.npy")) == 0
    found = open_vectors(tmp_path / "v.npy")
    assert found.vectors.shape == (7, 16) and found.metadata.trained_dims == [16]
    assert embed.main(embed_argv(run, pictures, tmp_path / "v.npy", "--dim", 16)) == 0
    np.testing.assert_array_equal(found.vectors, open_vectors(tmp_path / "v.npy").vectors)


def test_a_model_that_is_no_folder_is_refused_before_anything_is_written(pictures, tmp_path, capsys):
    assert embed.main(embed_argv("someone/small", pictures, tmp_path / "v.npy")) == 2
    assert "someone/small has no model.json" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_names_that_are_not_utf_8_are_embedded_found_and_printed(saved_run, pictures, tmp_path, capsys):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    shutil.copytree(pictures.folder, folder)
    name = os.fsdecode(b"\xff.png")
    (folder / "2.png").rename(folder / name)
    argv = [*embed_argv(saved_run, pictures, folder / "v.npy"), "--images", str(folder)]
    assert embed.main(argv) == 0
    assert name in open_vectors(folder / "v.npy").ids
    assert search.main(["--vectors", str(folder / "v.npy"), "--image", str(folder / name)]) == 0
    assert "1  1.0000      \\udcff.png" in capsys.readouterr().out
    (folder / name).write_bytes(b"")
    assert check.main([str(folder)]) == 1
    assert "caf\\udce9/\\udcff.png cannot be read" in capsys.readouterr().out


def test_folders_of_tools_and_unreadable_images_are_left_out_and_counted(saved_run, pictures, tmp_path, capsys):
    folder = shutil.copytree(pictures.folder, tmp_path / "images")
    shutil.copytree(pictures.folder, folder / "deep" / "@eaDir")
    (folder / "5.png").write_bytes(b"")
    argv = [*embed_argv(saved_run, pictures, tmp_path / "v.npy"), "--images", str(folder)]
    assert embed.main([*argv, "--max_unreadable", "0.1"]) == 2
    assert f"1 of 8 {folder} images cannot be read" in capsys.readouterr().err
    assert embed.main([*argv, "--max_unreadable", "0.2"]) == 0
    printed = capsys.readouterr()
    assert "7 images x 96 dims" in printed.out and f"{folder}/5.png cannot be read" in printed.err
    assert "left out: 1 folders of tools (@eaDir), 1 images that cannot be read" in printed.out
    assert "5.png" not in open_vectors(tmp_path / "v.npy").ids


def test_a_rotated_photograph_finds_its_upright_twin_if_the_model_says_so(make_saved_run, tmp_path, capsys):
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
        out = tmp_path / f"{rule}.npy"
        argv = ["--run", run, "--images", tmp_path / "photos", "--out", out, "--num_workers", 0]
        assert embed.main([str(part) for part in argv]) == 0
        rotated, other = np.load(out)
        cosines[rule] = rotated @ other
    assert cosines["apply"] > 0.9999 > cosines["ignore"]
