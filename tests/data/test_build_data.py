import os
import shutil

import numpy as np
import pytest
import torch

from mrl import distributed
from mrl.config import DataConfig
from mrl.data import build_data, cores_per_process
from mrl.data.folder import FolderImages
from mrl.data.memory import MemoryImages, check_fits, load_digits
from mrl.errors import UserError

CPU = torch.device("cpu")
DIGITS = DataConfig(name="digits", eval_resize_px=32, eval_px=32)


def test_digits_are_split_evenly_by_class():
    splits = load_digits(8)
    assert [len(splits[split][1]) for split in ("train", "val")] == [1442, 355]
    train, val = (torch.bincount(splits[split][1]) for split in ("train", "val"))
    assert torch.equal(val, (train + val) // 5)


def test_every_fifth_digit_of_a_class_is_held_out_unchanged():
    from sklearn import datasets

    digits = datasets.load_digits()
    images, labels = load_digits(8)["val"]
    of_class = [i for i, label in enumerate(digits.target) if label == 7]
    expected = digits.images[of_class[4::5]] * 255 / 16
    assert torch.equal(images[labels == 7][:, 1], torch.from_numpy(expected).round().to(torch.uint8))


def test_digits_have_the_size_that_is_evaluated():
    images, labels = load_digits(32)["train"]
    assert images.shape == (1442, 3, 32, 32) and images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert images.max() == 255 and torch.equal(images[:, 0], images[:, 2])


@pytest.mark.parametrize(
    ("name", "backend", "kind"),
    [
        ("folder", "auto", FolderImages),
        ("imagenet", "auto", FolderImages),
        ("tiny_imagenet", "auto", MemoryImages),
        ("tiny_imagenet", "folder", FolderImages),
        ("imagenet", "memory", MemoryImages),
    ],
)
def test_the_backend_is_chosen_or_obeyed(two_classes, name, backend, kind):
    for folder in [*two_classes.root.glob("*/a"), *two_classes.root.glob("*/b")]:
        folder.rename(folder.with_name("n0000000" + str("ab".index(folder.name))))  # as ImageNet's classes are called
    images = build_data(two_classes.config(name=name, backend=backend), 0, CPU, is_main=False)
    assert list(images) == ["train", "val"] and all(type(part) is kind for part in images.values())


def test_one_line_says_what_is_there_and_why_it_is_kept_so(two_classes, capsys):
    (two_classes.root / "val" / "a" / "notes.txt").write_text("")
    build_data(DIGITS, 0, CPU)
    build_data(two_classes.config(num_workers=3), 0, CPU)
    build_data(two_classes.config(backend="memory"), 0, CPU)
    assert capsys.readouterr().out.splitlines() == [
        "data: digits, train 1,442 + val 355 images of 10 classes, memory backend (auto: small set), 5.3 MiB",
        "data: folder, train 7 + val 5 images of 2 classes, folder backend "
        "(auto: set of any size, 3 worker processes), 1 files ignored that are no images",
        "data: folder, train 7 + val 5 images of 2 classes, memory backend (as data.backend says), 0.1 MiB, "
        "1 files ignored that are no images",
    ]
    build_data(DIGITS, 0, CPU, is_main=False)
    assert capsys.readouterr() == ("", "")


def test_only_the_wanted_splits_are_read(two_classes):
    assert list(build_data(two_classes.config(), 0, CPU, is_main=False, splits=("val",))) == ["val"]


def test_the_seed_reaches_the_crops(two_classes):
    parts = [build_data(two_classes.config(backend="memory"), seed, CPU, False)["train"] for seed in (0, 0, 1)]
    first, again, other = (next(part.train_batches([np.arange(7)], 0, 32))[0] for part in parts)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_images_in_memory_are_the_center_square_of_oblong_ones(image_folder):
    root = image_folder({"train": {"a": 1}, "val": {"a": 1}}, size=(60, 96))
    config = DataConfig(name="folder", root=str(root), backend="memory", eval_resize_px=30, eval_px=30)
    memory = build_data(config, 0, CPU, is_main=False)["val"]
    folder = build_data(DataConfig(**{**vars(config), "backend": "folder", "num_workers": 0}), 0, CPU, False)["val"]
    (from_memory, _), (from_folder, _) = (next(part.eval_batches([np.arange(1)])) for part in (memory, folder))
    assert from_memory.shape == (1, 3, 30, 30) and torch.equal(from_memory, from_folder)


def test_a_root_must_be_given():
    with pytest.raises(
        UserError, match=r"data.root is not given; data.name imagenet needs the folder that holds train/"
    ):
        build_data(DataConfig(), 0, CPU)


def test_digits_have_no_files():
    with pytest.raises(
        UserError, match=r"data.backend is 'folder', but digits has no image files; allowed: auto, memory"
    ):
        build_data(DataConfig(name="digits", backend="folder"), 0, CPU)


def test_a_wrong_number_of_classes_is_refused(two_classes):
    with pytest.raises(UserError, match=r"data.num_classes is 200, but the train split has 2 classes"):
        build_data(two_classes.config(num_classes=200), 0, CPU)
    with pytest.raises(UserError, match=r"data.num_classes is 2, but the train split has 10 classes"):
        build_data(DataConfig(name="digits", num_classes=2), 0, CPU)
    assert build_data(two_classes.config(num_classes=2), 0, CPU, is_main=False)


def test_machines_with_other_images_are_refused(two_classes, tmp_path, monkeypatch):
    def digests(root):
        seen = []
        with monkeypatch.context() as patch:
            # The first thing agreed on is the backend, a small number.
            patch.setattr(distributed, "agree", lambda number: number < 3 or seen.append(number) or number in seen[:-1])
            with pytest.raises(UserError, match=f"data.root {root} does not hold the same images on all machines"):
                build_data(two_classes.config(root=str(root)), 0, CPU)
            build_data(two_classes.config(root=f"{root}/"), 0, CPU)  # the same again
        return seen[0]

    here = digests(two_classes.root)
    copy = tmp_path / "another" / "place"
    shutil.copytree(two_classes.root, copy)
    assert digests(copy) == here
    (copy / "val" / "a" / "0.png").rename(copy / "val" / "b" / "9.png")
    assert digests(copy) != here


def test_machines_that_would_read_by_different_backends_are_refused(two_classes, monkeypatch):
    monkeypatch.setattr(distributed, "agree", lambda number: number > 2)
    with pytest.raises(UserError, match="would read it by different backends"):
        build_data(two_classes.config(), 0, CPU)


def test_splits_with_other_classes_are_refused_and_named(image_folder):
    root = image_folder({"train": {name: 1 for name in "abcdefgh"}, "val": {"h": 1, "z": 1}}, size=(8, 8))
    with pytest.raises(UserError, match="differ: only in train: a, b, c, d, e and 2 more; only in val: z"):
        build_data(DataConfig(name="folder", root=str(root)), 0, CPU)


def test_more_images_than_memory_holds_are_refused_before_reading():
    with pytest.raises(UserError, match=r"needs .* GiB for 1,000,000,000 images of 256 px, .* use data.backend folder"):
        check_fits(1_000_000_000, 256, CPU)
    check_fits(1000, 64, CPU)


def test_the_memory_backend_asks_for_room_first(two_classes, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: 200)  # 200 pages of 200 bytes; the 12 images take 82,944
    with pytest.raises(UserError, match="GiB for 12 images of 48 px"):
        build_data(two_classes.config(backend="memory"), 0, CPU)


def test_processes_of_one_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert cores_per_process() == 12
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert cores_per_process() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert cores_per_process() == 3
