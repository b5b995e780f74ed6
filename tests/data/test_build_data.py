"""Choosing and describing a backend, and the batches that all three have in common."""

import dataclasses
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from mrl import distributed
from mrl.config import DataConfig
from mrl.data import BACKENDS, build_data
from mrl.data.folder import FolderImages
from mrl.data.memory import MemoryImages, load_digits
from mrl.data.transforms import eval_indices, train_indices
from mrl.data.write_ffcv import main as write_ffcv
from mrl.errors import UserError

CPU = torch.device("cpu")
DIGITS = DataConfig(name="digits", eval_resize_px=32, eval_px=32)
NORMALIZED_LEVEL = 1 / 255 / 0.224  # one gray level
ALL = ["memory", "folder", pytest.param("ffcv", marks=pytest.mark.ffcv)]


@pytest.fixture
def build(two_classes):
    """Return the splits of `two_classes` by a backend; FFCV files hold raw pixels."""

    def build(backend, seed=3, **changes):
        if backend == "ffcv" and not (two_classes.root / "val.beton").exists():
            for split in ("train", "val"):
                arguments = ["--root", str(two_classes.root), "--split", split, "--jpeg_share", "0"]
                assert write_ffcv(arguments) == 0
        return build_data(two_classes.config(backend=backend, **changes), seed, CPU, is_main=False)

    return build


def stacked(batches):
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


@pytest.mark.parametrize("backend", ALL[1:])
@pytest.mark.parametrize("px", [32, 64])
def test_backends_cut_the_same_training_crops(build, backend, px):
    """To within rounding; FFCV averages areas where the others resample bilinearly."""
    batches = train_indices(7, 7, seed=3, epoch=1)
    (memory, labels), (other, other_labels) = (
        stacked(build(name)["train"].train_batches(batches, 1, px)) for name in ("memory", backend)
    )
    assert memory.shape == (7, 3, px, px) and torch.equal(labels, other_labels)
    later, _ = stacked(build(backend)["train"].train_batches(batches, 2, px))
    off, apart = (memory - other).abs(), (memory - later).abs()
    if backend == "folder":
        assert off.max() < 2 * NORMALIZED_LEVEL and apart.max() > 20 * NORMALIZED_LEVEL
    else:
        assert off.mean(dim=(1, 2, 3)).max() < 4 * NORMALIZED_LEVEL
        assert apart.mean(dim=(1, 2, 3)).min() > 8 * NORMALIZED_LEVEL


@pytest.mark.parametrize("backend", ALL)
def test_backends_evaluate_the_same_pixels_and_flip_mirrors_them(build, backend):
    batches = eval_indices(5, 2)
    expected, _ = stacked(build("folder")["val"].eval_batches(batches))
    val = build(backend)["val"]
    for flip in (False, True):
        found, labels = stacked(val.eval_batches(batches, flip))
        assert found.shape == (5, 3, 40, 40) and labels.tolist() == [0, 0, 1, 1, 1]
        assert torch.equal(found, expected.flip(3) if flip else expected)


@pytest.mark.parametrize("backend", ALL)
def test_batches_keep_the_contract(build, backend):
    train = build(backend)["train"]
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    for images, labels in [
        *train.train_batches(train_indices(7, 3, 0, 0), 0, 32),
        *train.eval_batches(eval_indices(7, 3)),
    ]:
        assert images.dtype == torch.float32 and images.is_contiguous(memory_format=torch.channels_last)
        assert labels.dtype == torch.int64 and len(labels) == len(images)
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(numpy_before, np.random.get_state()[1])  # noqa: NPY002
    assert train.classes == ["a", "b"] and BACKENDS[type(train)] == backend
    assert train.labels.dtype == torch.int64 and train.labels.device == CPU and len(train) == len(train.labels) == 7


@pytest.mark.parametrize("backend", ALL)
def test_an_image_is_the_same_in_any_batch_on_any_process_and_after_a_resume(build, backend):
    train = build(backend)["train"]
    whole, _ = stacked(train.train_batches([np.arange(7)], 4, 32))
    single, _ = stacked(train.train_batches([np.array([index]) for index in range(7)], 4, 32))
    torch.testing.assert_close(whole, single, atol=1e-5, rtol=0)
    for shares in ([train_indices(7, 6, 3, 4, rank, 2) for rank in (0, 1)], [train_indices(7, 2, 3, 4, start_step=1)]):
        batches = [batch for share in shares for batch in share]
        found, _ = stacked([batch for share in shares for batch in train.train_batches(share, 4, 32)])
        torch.testing.assert_close(found, whole[np.concatenate(batches)], atol=1e-5, rtol=0)
    other, _ = stacked(build(backend, 4)["train"].train_batches([np.arange(7)], 4, 32))
    assert not torch.equal(other, whole), "another seed"


@pytest.mark.parametrize("backend", ALL)
def test_fault_17_every_validation_image_is_seen_once_by_any_number_of_processes(build, backend):
    val = build(backend)["val"]
    shares = [eval_indices(5, 2, rank, 3) for rank in range(3)]
    seen, labels = stacked([batch for share in shares for batch in val.eval_batches(share)])
    expected, _ = stacked(val.eval_batches(eval_indices(5, 5)))
    assert torch.equal(seen, expected) and labels.tolist() == [0, 0, 1, 1, 1]


def test_rand_augment_depends_on_neither_worker_nor_batch_and_leaves_evaluation_alone(build):
    def trained(batches, epoch=0, num_workers=0, rand_augment="rand-m9-mstd0.5-inc1"):
        images = build("auto", num_workers=num_workers, rand_augment=rand_augment)
        crops, _ = stacked(images["train"].train_batches(batches, epoch, 40))
        return dict(zip(np.concatenate(batches).tolist(), crops, strict=True)), next(images["val"].eval_batches([[0]]))

    first, evaluated = trained([np.arange(4), np.arange(4, 7)])
    second, _ = trained([np.array([6, 0]), np.array([1, 5, 3]), np.array([2, 4])], num_workers=2)
    assert all(torch.equal(first[index], second[index]) for index in range(7))
    later, _ = trained([np.arange(7)], epoch=1)
    plain, evaluated_plain = trained([np.arange(7)], rand_augment=None)
    assert sum(torch.equal(first[index], later[index]) for index in range(7)) < 3
    assert sum(torch.equal(first[index], plain[index]) for index in range(7)) < 5  # half of the operations are left out
    assert torch.equal(evaluated[0], evaluated_plain[0])


def test_labels_stay_distinct_where_float16_would_merge_them(transform):
    pixels = torch.zeros(1, 3, 48, 48, dtype=torch.uint8).expand(70_000, -1, -1, -1)
    images = MemoryImages(pixels, torch.arange(70_000), [], dataclasses.replace(transform, eval_px=8), CPU)
    batches = [np.arange(start, start + 50) for start in (0, 2048, 65_500, 69_950)]
    _, found = stacked(images.eval_batches(batches))
    assert found.tolist() == np.concatenate(batches).tolist()


def test_every_fifth_digit_of_a_class_is_held_out_unchanged():
    from sklearn import datasets

    digits = datasets.load_digits()
    splits = load_digits(8)
    assert [len(labels) for _, labels in splits.values()] == [1442, 355]
    train, val = (torch.bincount(labels) for _, labels in splits.values())
    assert torch.equal(val, (train + val) // 5)
    images, labels = splits["val"]
    assert images.dtype == torch.uint8 and labels.dtype == torch.int64
    expected = digits.images[np.flatnonzero(digits.target == 7)[4::5]] * 255 / 16
    assert torch.equal(images[labels == 7][:, 1], torch.from_numpy(expected).round().to(torch.uint8))
    assert load_digits(32)["train"][0].shape == (1442, 3, 32, 32)


@pytest.mark.parametrize(
    ("name", "backend", "chosen"),
    [("imagenet", "auto", "folder"), ("tiny_imagenet", "auto", "memory"), ("imagenet", "memory", "memory")],
)
def test_the_backend_is_chosen_or_obeyed(two_classes, name, backend, chosen):
    for folder in [*two_classes.root.glob("*/a"), *two_classes.root.glob("*/b")]:
        folder.rename(folder.with_name("n0000000" + str("ab".index(folder.name))))  # as ImageNet's classes are called
    images = build_data(two_classes.config(name=name, backend=backend), 0, CPU, is_main=False)
    assert list(images) == ["train", "val"] and {BACKENDS[type(part)] for part in images.values()} == {chosen}
    only_val = build_data(two_classes.config(name=name, backend=backend), 0, CPU, is_main=False, splits=("val",))
    assert list(only_val) == ["val"]


def test_one_line_describes_the_images_and_the_choice_of_backend(two_classes, capsys):
    (two_classes.root / "val" / "a" / "notes.txt").write_text("")
    build_data(DIGITS, 0, CPU)
    build_data(two_classes.config(num_workers=3), 0, CPU)
    build_data(two_classes.config(backend="memory"), 0, CPU)
    build_data(two_classes.config(name="tiny_imagenet", rand_augment="rand-m9"), 0, CPU)
    folder, left_out = (
        "data: folder, train 7 + val 5 images of 2 classes,",
        "; left out: 1 files of other types (.txt)",
    )
    assert capsys.readouterr().out.splitlines() == [
        "data: digits, train 1,442 + val 355 images of 10 classes, memory backend (auto: small set), 5.3 MiB",
        f"{folder} folder backend (auto: set of any size, 3 worker processes){left_out}",
        f"{folder} memory backend (as data.backend says), 0.1 MiB{left_out}",
        f"{folder.replace('folder', 'tiny_imagenet')} folder backend (auto: for RandAugment, 0 worker processes)"
        f"{left_out}",
    ]
    build_data(DIGITS, 0, CPU, is_main=False)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"root": None, "name": "imagenet"}, "data.root is not given; data.name imagenet needs the folder"),
        ({"root": None, "backend": "ffcv"}, "data.root is not given; data.backend ffcv needs the folder"),
        ({"name": "digits", "backend": "folder"}, "but digits has no image files; allowed: auto, memory"),
        ({"num_classes": 200}, "data.num_classes is 200, but the train split has 2 classes"),
        ({"name": "digits", "num_classes": 2}, "data.num_classes is 2, but the train split has 10 classes"),
        (
            {"backend": "memory", "rand_augment": "rand-m9"},
            "data.rand_augment is 'rand-m9', but .*--data.backend folder",
        ),
    ],
)
def test_impossible_settings_are_refused(two_classes, settings, message):
    with pytest.raises(UserError, match=message):
        build_data(two_classes.config(**settings), 0, CPU)


def test_machines_with_other_images_are_refused(two_classes, tmp_path, monkeypatch):
    def digests(root):
        seen = []
        with monkeypatch.context() as patch:
            # The first number to agree on is that of the backend.
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
    monkeypatch.setattr(distributed, "agree", lambda number: number > 2)
    with pytest.raises(UserError, match="would use different backends"):
        build_data(two_classes.config(), 0, CPU)


def test_more_images_than_memory_holds_are_refused_before_reading(two_classes, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: 200)  # 200 pages of 200 bytes; the 12 images take 82,944
    with pytest.raises(UserError, match=r"needs .* GiB for 12 images of 48 px, .* use data.backend folder"):
        build_data(two_classes.config(backend="memory"), 0, CPU)


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        ("abcdefgh", "hz", "differ: only in train: a, b, c, d, e and 2 more; only in val: z; no model"),
        ("a", "a", r"the train split has 1 classes \(a\), but a classifier needs 2 or more"),
    ],
)
def test_classes_that_cannot_be_trained_are_refused_and_named(image_folder, train, val, message):
    root = image_folder({"train": dict.fromkeys(train, 1), "val": dict.fromkeys(val, 1)}, size=(8, 8))
    with pytest.raises(UserError, match=message):
        build_data(DataConfig(name="folder", root=str(root), missing_classes="allow"), 0, CPU)


@pytest.mark.parametrize("backend", ALL)
def test_classes_that_lack_images_are_left_out_if_allowed(image_folder, backend, capsys):
    """Of b there are training images only, of d none at all."""
    root = image_folder({"train": {"a": 1, "b": 1, "c": 2, "d": 0}, "val": {"a": 1, "c": 2}}, size=(8, 8))
    config = DataConfig(name="folder", root=str(root), backend=backend, num_workers=0, eval_resize_px=8, eval_px=8)
    if backend == "ffcv":
        for split in ("train", "val"):
            assert write_ffcv(["--root", str(root), "--split", split, "--missing_classes", "allow"]) == 0
    else:
        with pytest.raises(
            UserError, match="folder .*/d has no images; .* or train without .*--data.missing_classes allow"
        ):
            build_data(config, 0, CPU)
        (root / "train" / "d").rmdir()
    with pytest.raises(UserError, match="only in train: b; .*; a training with --data.missing_classes allow goes on"):
        build_data(config, 0, CPU)
    (root / "train" / "d").mkdir(exist_ok=True)
    images = build_data(dataclasses.replace(config, missing_classes="allow"), 0, CPU)
    line = capsys.readouterr().out.splitlines()[-1]
    assert "1 classes without val images (b)" in line
    assert backend == "ffcv" or "1 classes without images (d)" in line
    assert images["val"].classes == images["train"].classes == ["a", "b", "c"]
    _, labels = stacked(images["val"].eval_batches(eval_indices(3, 3)))
    assert labels.tolist() == [0, 2, 2] and images["train"].labels.tolist() == [0, 1, 2, 2]
    if backend != "ffcv":  # an unknown class can never be right
        (root / "val" / "z").mkdir()
        shutil.copy(root / "val" / "a" / "0.png", root / "val" / "z" / "0.png")
        with pytest.raises(UserError, match="only in val: z; no model predicts classes that it was not trained"):
            build_data(dataclasses.replace(config, missing_classes="allow"), 0, CPU)


def test_a_split_without_any_image_is_refused_before_the_training(image_folder):
    root = image_folder({"train": {"a": 1, "b": 1}, "val": {"a": 0, "b": 0}}, size=(8, 8))
    with pytest.raises(UserError, match="the val split of data.root .* has no images"):
        build_data(DataConfig(name="folder", root=str(root), missing_classes="allow"), 0, CPU)


def damage(two_classes, *names):
    for name in names:
        (two_classes.root / name).write_bytes(b"no image")


@pytest.mark.parametrize("backend", ["memory", "folder"])
def test_a_bounded_share_of_unreadable_images_is_left_out_counted_and_named(two_classes, backend, capsys):
    damage(two_classes, "train/a/1.png", "val/b/0.png", "val/b/2.png")
    config = two_classes.config(backend=backend, max_unreadable=0.4)
    images = build_data(config, 0, CPU)
    assert "train 6 + val 3 images" in (line := capsys.readouterr().out) and "3 images that cannot be read" in line
    assert images["train"].labels.tolist() == [0, 0, 0, 1, 1, 1] and images["val"].labels.tolist() == [0, 0, 1]
    assert len(stacked(images["train"].train_batches([np.arange(6)], 0, 32))[0]) == 6
    named = [reason.split(" cannot")[0] for reason in images["val"].unreadable]
    assert named == [f"{two_classes.root}/val/b/{i}.png" for i in (0, 2)] and len(images["train"].unreadable) == 1
    damage(two_classes, "val/b/1.png")
    build_data(two_classes.config(backend=backend, max_unreadable=0.6), 0, CPU)
    assert ", 1 classes without images (b)" in capsys.readouterr().out
    message = r"3 of 5 val images cannot be read: .*/0.png .*/2.png .*mrl.data.check DIR .* here if it is 0.6 or more"
    with pytest.raises(UserError, match=message):
        build_data(two_classes.config(backend=backend, max_unreadable=0.59), 0, CPU)
    with pytest.raises(UserError, match="3 of 5 val images cannot" if backend == "folder" else "train/a/1.png cannot"):
        build_data(two_classes.config(backend=backend), 0, CPU)  # val too is read before the training


@pytest.mark.parametrize("max_unreadable", [0.0, 0.1])
@pytest.mark.parametrize("backend", ["memory", "folder"])
def test_an_evaluation_is_not_told_to_leave_images_out(two_classes, backend, max_unreadable):
    damage(two_classes, "val/b/0.png")
    config = two_classes.config(backend=backend, max_unreadable=max_unreadable)
    with pytest.raises(UserError, match=r"val/b/0\.png cannot be read .*lists all such images, to restore or remove$"):
        images = build_data(config, 0, CPU, False, splits=("val",), classes=["a", "b"])["val"]
        list(images.eval_batches(eval_indices(5, 5)))


@pytest.mark.parametrize("backend", ALL)
def test_backends_turn_images_alike(two_classes, backend):
    exif = Image.Exif()
    exif[0x112] = 6
    for path in two_classes.root.rglob("*.png"):
        Image.open(path).save(path, exif=exif)
    pixels = {}
    for rule in ("apply", "ignore"):
        if backend == "ffcv":
            for path in two_classes.root.glob("*.beton"):
                path.unlink()
            for split in ("train", "val"):
                arguments = ["--root", str(two_classes.root), "--split", split, "--jpeg_share", "0"]
                assert write_ffcv([*arguments, "--exif_rotation", rule]) == 0
        config = two_classes.config(backend=backend, exif_rotation=rule)
        pixels[rule], _ = stacked(build_data(config, 0, CPU, False)["val"].eval_batches(eval_indices(5, 5)))
    assert torch.equal(pixels["apply"], pixels["ignore"].rot90(-1, (2, 3)))
    if backend == "ffcv":
        with pytest.raises(UserError, match="was written with --exif_rotation ignore, but data.exif_rotation is apply"):
            build_data(dataclasses.replace(config, exif_rotation="apply"), 0, CPU)


@pytest.fixture
def no_ffcv(two_classes, monkeypatch):
    """`two_classes` with files that are named as FFCV's, and no FFCV to import."""
    for name in [name for name in sys.modules if name.split(".")[0] == "ffcv"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ffcv", None)
    for split in ("train", "val"):
        (two_classes.root / f"{split}.beton").write_bytes(b"12345")
    return two_classes


def test_without_ffcv_auto_uses_the_folder_and_says_why_or_what_to_install(no_ffcv, capsys):
    assert isinstance(build_data(no_ffcv.config(), 0, CPU)["val"], FolderImages)
    reason = "auto: FFCV cannot be imported, so train.beton and val.beton cannot be read"
    assert f"folder backend ({reason}, 0 worker processes)" in capsys.readouterr().out
    message = "FFCV cannot be imported .*; install it .apt-get install .* libopencv-dev libturbojpeg0-dev, then pip "
    (no_ffcv.root / "train").rename(no_ffcv.root / "elsewhere")
    for backend in ("ffcv", "auto"):  # now there is nothing else to read
        with pytest.raises(UserError, match=message):
            build_data(no_ffcv.config(backend=backend), 0, CPU)
