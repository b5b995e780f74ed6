import contextlib
import json
import multiprocessing
import os
import shutil
import time

import pytest

from mrl.data import folder as listing
from mrl.data.folder import cache_path, list_images, read_tree
from mrl.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mrl"


@pytest.fixture
def root(tmp_path):
    """Three images in two classes, one of them two folders deep, in folders that have not changed for a minute."""
    for name in ("train/a/1.jpg", "train/a/deep/deeper/2.jpg", "train/b/3.jpg", "train/b/notes.txt"):
        touch(tmp_path / "root" / name)
    settle(tmp_path / "root")
    return tmp_path / "root"


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")


def settle(root):
    minute_ago = time.time() - 60
    for folder, _, _ in os.walk(root):
        os.utime(folder, (minute_ago, minute_ago))


def listed(root):
    found = list_images(root, "train")
    return [os.path.relpath(path, root / "train") for path in found.paths], found


@pytest.fixture
def no_walk(monkeypatch):
    def refuse(top):
        raise AssertionError("the folders were listed again")

    def arrange():
        monkeypatch.setattr(listing, "_walk", refuse)

    return arrange


def test_the_second_listing_is_read_from_the_cache_and_equal(root, no_walk):
    first = list_images(root, "train")
    no_walk()
    second = list_images(root, "train")
    assert second.paths == first.paths == [f"{root}/train/{n}" for n in ("a/1.jpg", "a/deep/deeper/2.jpg", "b/3.jpg")]
    assert second.labels.tolist() == [0, 0, 1] and second.classes == ["a", "b"]
    assert second.num_ignored == first.num_ignored == 1


def test_the_cache_serves_every_name_of_the_folder(root, tmp_path, no_walk, monkeypatch):
    list_images(root, "train")
    (tmp_path / "link").symlink_to(root)
    no_walk()
    assert list_images(tmp_path / "link", "train").paths[0] == f"{tmp_path}/link/train/a/1.jpg"
    monkeypatch.chdir(tmp_path)
    assert list_images("root", "train").paths[0] == "root/train/a/1.jpg"


CHANGES = {
    "an image more": lambda train: touch(train / "a" / "0.jpg"),
    "an image less": lambda train: (train / "a" / "1.jpg").unlink(),
    "an image more in a nested folder": lambda train: touch(train / "a" / "deep" / "deeper" / "0.jpg"),
    "a first image in a folder of folders": lambda train: touch(train / "a" / "deep" / "0.jpg"),
    "a renamed image": lambda train: (train / "a" / "1.jpg").rename(train / "a" / "9.jpg"),
    "a class more": lambda train: touch(train / "c" / "4.jpg"),
    "a class less": lambda train: shutil.rmtree(train / "b"),
    "a renamed class": lambda train: (train / "b").rename(train / "c"),
    "a renamed nested folder": lambda train: (train / "a" / "deep").rename(train / "a" / "other"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_of_the_folders_is_noticed(root, change):
    before, _ = listed(root)
    change(root / "train")
    after, _ = listed(root)
    assert after != before
    shutil.rmtree(cache_path(root / "train").parent)
    assert after == listed(root)[0]


def test_another_folder_put_in_the_place_is_noticed_although_it_is_as_old(root):
    listed(root)
    shutil.copytree(root / "train", root / "copy")
    (root / "copy" / "a" / "1.jpg").rename(root / "copy" / "a" / "9.jpg")
    for folder in ("a/deep/deeper", "a/deep", "a", "b", "."):
        shutil.copystat(root / "train" / folder, root / "copy" / folder)
    shutil.rmtree(root / "train")
    (root / "copy").rename(root / "train")
    assert "a/9.jpg" in listed(root)[0]


def test_folders_that_changed_a_moment_ago_are_not_kept(root, cache):
    """Another change in the same tick of the file system's clock would not be seen."""
    touch(root / "train" / "a" / "0.jpg")
    listed(root)
    assert not cache.exists()
    settle(root)
    listed(root)
    assert [path.name for path in cache.iterdir()] == [cache_path(root / "train").name]


@pytest.mark.parametrize("content", [b"", b"[[", b"\xff\x00", b"null", b"[]", b'{"a": 1}', b'[["", 1]]', None])
def test_a_corrupt_cache_is_made_anew(root, content):
    expected, _ = listed(root)
    path = cache_path(root / "train")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    assert listed(root)[0] == expected
    assert path.read_bytes() == whole


def test_a_cache_that_cannot_be_written_costs_nothing_but_a_line(root, cache, capsys):
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")
    assert len(list_images(root, "train", show_progress=True).paths) == 3
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"the list of {root / 'train'} is not kept for the next start")


def list_and_spoil(root):
    """The file names that twenty listings give, between which the cache is removed or cut short."""
    found = set()
    for turn in range(20):
        found.add(tuple(listed(root)[0]))
        with contextlib.suppress(FileNotFoundError):
            if turn % 2:
                cache_path(root / "train").unlink()
            else:
                os.truncate(cache_path(root / "train"), 20)
    return found


def test_many_processes_may_list_at_once(root, cache):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = pool.map(list_and_spoil, [root] * 4, chunksize=1)
    assert set.union(*found) == {("a/1.jpg", "a/deep/deeper/2.jpg", "b/3.jpg")}
    list_images(root, "train")
    assert [path.name for path in cache.iterdir()] == [cache_path(root / "train").name], "nothing half-written is left"


def test_names_of_any_bytes_are_kept(root):
    name = os.fsdecode(b"caf\xe9\n1.jpg")  # Latin-1, and a line break
    touch(root / "train" / "b" / name)
    settle(root)
    for _ in range(2):
        assert f"b/{name}" in listed(root)[0]
    assert any(name in folder[2] for folder in json.loads(cache_path(root / "train").read_text()))


def test_linked_class_folders_are_followed_and_watched(root, tmp_path):
    touch(tmp_path / "elsewhere" / "5.jpg")
    (root / "train" / "c").symlink_to(tmp_path / "elsewhere")
    settle(root)
    settle(tmp_path / "elsewhere")
    assert listed(root)[0][-1] == "c/5.jpg"
    touch(tmp_path / "elsewhere" / "6.jpg")
    assert listed(root)[0][-1] == "c/6.jpg"


def test_a_folder_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=f"^{tmp_path}/gone cannot be listed: No such file or directory$"):
        read_tree(tmp_path / "gone")


def test_an_unset_or_relative_cache_folder_is_the_usual_one(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_path(tmp_path).parent == tmp_path / ".cache" / "mrl"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_path(tmp_path).parent == tmp_path / ".cache" / "mrl"
