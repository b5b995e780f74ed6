"""The ffcv backend keeps the common contract: the folder backend's images by way of .beton files."""

import dataclasses
import json
import os
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mrl.config import DataConfig
from mrl.data import build_data
from mrl.data.ffcv import IMAGES_PER_TASK, Description, FFCVFile, FFCVImages, import_ffcv, read_description
from mrl.data.folder import FolderImages, ImageList, list_images
from mrl.data.transforms import eval_indices, random_resized_crops, train_indices
from mrl.data.write_ffcv import Settings, write
from mrl.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("MRL_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
CPU = torch.device("cpu")
LEVEL = 1 / 255 / 0.25  # one gray level in units of the mean of the normalized channels
needs_ffcv = pytest.mark.ffcv


def write_split(root, split, jpeg_share=0.0, **settings):
    return write(list_images(root, split), split, root / f"{split}.beton", Settings(500, jpeg_share, **settings), 2)


def stacked(batches):
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def opened(path):
    return FFCVFile(path, read_description(path))


@pytest.fixture
def with_ffcv_files(two_classes):
    """`two_classes` with its two .beton files, half JPEG and raw."""
    write_split(two_classes.root, "train", 0.5, quality=95)
    write_split(two_classes.root, "val")
    return two_classes


@pytest.fixture
def both(with_ffcv_files):
    """The same images by both backends."""
    parts = {b: build_data(with_ffcv_files.config(backend=b), 3, CPU, is_main=False) for b in ("folder", "ffcv")}
    assert isinstance(parts["folder"]["train"], FolderImages) and isinstance(parts["ffcv"]["train"], FFCVImages)
    return parts


@needs_ffcv
@pytest.mark.parametrize("flip", [False, True])
def test_raw_images_are_evaluated_on_the_folders_very_pixels(both, flip):
    rows = eval_indices(5, 2)
    (folder, labels), (ffcv, ffcv_labels) = (stacked(both[b]["val"].eval_batches(rows, flip)) for b in both)
    assert ffcv.shape == (5, 3, 40, 40)
    assert torch.equal(folder, ffcv)
    assert torch.equal(labels, ffcv_labels) and labels.tolist() == [0, 0, 1, 1, 1]


@needs_ffcv
def test_jpeg_images_are_evaluated_within_a_few_levels(both):
    (folder, labels), (ffcv, ffcv_labels) = (stacked(both[b]["train"].eval_batches(eval_indices(7, 4))) for b in both)
    assert torch.equal(labels, ffcv_labels)
    off = (folder - ffcv).abs().mean(dim=(1, 2, 3)) / LEVEL
    assert (off == 0).sum() == 4 and off.max() < 5  # of 7 images 4 are stored raw


@needs_ffcv
@pytest.mark.parametrize("px", [24, 40])
def test_training_crops_are_the_folders(both, px):
    """The same boxes and flips; area interpolation where the folder has antialiased bilinear."""
    rows = train_indices(7, 7, seed=3, epoch=1)
    (folder, labels), (ffcv, ffcv_labels) = (stacked(both[b]["train"].train_batches(rows, 1, px)) for b in both)
    assert ffcv.shape == (7, 3, px, px) and torch.equal(labels, ffcv_labels)
    assert (folder - ffcv).abs().mean(dim=(1, 2, 3)).max() < 4 * LEVEL
    other, _ = stacked(both["ffcv"]["train"].train_batches(rows, 2, px))
    assert (folder - other).abs().mean(dim=(1, 2, 3)).min() > 8 * LEVEL


@needs_ffcv
def test_a_crop_is_resampled_by_averaging_areas(with_ffcv_files, transform):
    plain = dataclasses.replace(transform, crop_scale=(1, 1), crop_ratio=(1, 1), mean=(0, 0, 0), std=(1, 1, 1))
    uncropped = dataclasses.replace(plain, eval_px=48, eval_resize_px=48)
    images = FFCVImages(opened(with_ffcv_files.root / "val.beton"), plain, CPU, ThreadPoolExecutor(1))
    whole, _ = stacked(images.train_batches([np.arange(5)], 0, 48))
    quarters, _ = stacked(images.train_batches([np.arange(5)], 0, 24))
    expected = whole.reshape(5, 3, 24, 2, 24, 2).mean(dim=(3, 5))
    assert (quarters - expected).abs().max() * 255 <= 0.51
    _, flipped = random_resized_crops(5, 0, np.arange(5), np.full(5, 48), np.full(5, 48), (1, 1), (1, 1), True)
    uncut = FFCVImages(opened(with_ffcv_files.root / "val.beton"), uncropped, CPU, ThreadPoolExecutor(1))
    straight, _ = stacked(uncut.eval_batches([np.arange(5)]))
    assert torch.equal(whole, torch.where(torch.from_numpy(flipped)[:, None, None, None], straight.flip(3), straight))


@needs_ffcv
def test_batches_keep_the_contract(both):
    train = both["ffcv"]["train"]
    for images, labels in [
        *train.train_batches(train_indices(7, 3, 0, 0), 0, 32),
        *train.eval_batches(eval_indices(7, 3)),
    ]:
        assert images.dtype == torch.float32 and images.is_contiguous(memory_format=torch.channels_last)
        assert labels.dtype == torch.int64 and len(labels) == len(images)
    (as_list, _), (as_array, _) = (next(train.eval_batches([rows])) for rows in ([6, 2], np.array([6, 2])))
    assert torch.equal(as_list, as_array)
    assert train.classes == ["a", "b"] and len(train) == len(train.labels) == 7
    assert train.labels.dtype == torch.int64 and train.labels.device == CPU


@needs_ffcv
def test_an_image_is_the_same_in_any_batch_on_any_process_and_after_a_resume(both, with_ffcv_files):
    train = both["ffcv"]["train"]
    whole, _ = stacked(train.train_batches([np.arange(7)], 4, 32))
    single, _ = stacked(train.train_batches([np.array([row]) for row in range(7)], 4, 32))
    assert torch.equal(whole, single)
    shares = [train_indices(7, 6, 0, 4, rank, 2) for rank in (0, 1)]
    two, _ = stacked([batch for share in shares for batch in train.train_batches(share, 4, 32)])
    assert torch.equal(two, whole[np.concatenate([share[0] for share in shares])])
    straight, resumed = (
        stacked(build_data(with_ffcv_files.config(num_workers=n), 3, CPU, False)["train"].train_batches(rows, 4, 32))
        for n, rows in ((1, train_indices(7, 2, 3, 4)[1:]), (3, train_indices(7, 2, 3, 4, start_step=1)))
    )
    assert torch.equal(straight[0], resumed[0]) and torch.equal(straight[1], resumed[1])


@needs_ffcv
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_fault_17_every_validation_image_is_seen_once_by_any_number_of_processes(both, world_size):
    val = both["ffcv"]["val"]
    shares = [eval_indices(5, 2, rank, world_size) for rank in range(world_size)]
    seen, labels = stacked([batch for share in shares for batch in val.eval_batches(share)])
    expected, _ = stacked(val.eval_batches(eval_indices(5, 5)))
    assert torch.equal(seen, expected) and labels.tolist() == [0, 0, 1, 1, 1]


@needs_ffcv
def test_a_batch_is_put_together_from_the_work_of_several_threads(both):
    train = both["ffcv"]["train"]
    rows = np.arange(3 * IMAGES_PER_TASK + 1) % 7
    (many, labels), (few, _) = (next(train.train_batches([these], 0, 32)) for these in (rows, np.arange(7)))
    assert torch.equal(many, few[rows]) and torch.equal(labels, train.labels[rows])


@needs_ffcv
def test_reading_leaves_the_global_generators_and_the_number_of_threads_alone(both, monkeypatch):
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    list(both["ffcv"]["train"].train_batches(train_indices(7, 2, 0, 0), 0, 32))
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(numpy_before, np.random.get_state()[1])  # noqa: NPY002
    for name in [name for name in sys.modules if name.split(".")[0] == "ffcv"]:
        monkeypatch.delitem(sys.modules, name)
    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert import_ffcv().__name__ == "ffcv" and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(num_threads)


@needs_ffcv
def test_labels_stay_distinct_where_float16_would_merge_them(two_classes, tmp_path, transform):
    path = str(next((two_classes.root / "val").rglob("*.png")))
    labels = torch.tensor([2048, 2049, 65_519, 65_520, 70_000])
    images = ImageList([path] * 5, labels, [f"{number:05d}" for number in range(70_001)], 0)
    write(images, "train", tmp_path / "many.beton", Settings(), 1)
    many = FFCVImages(opened(tmp_path / "many.beton"), transform, CPU, ThreadPoolExecutor(1))
    _, found = stacked(many.eval_batches(eval_indices(5, 2)))
    assert torch.equal(found, labels)


@needs_ffcv
def test_an_unfinished_pass_leaves_no_work_behind(both):
    train = both["ffcv"]["train"]
    batches = train.train_batches([np.full(64, row % 7) for row in range(40)], 0, 32)
    next(batches)
    batches.close()
    assert train._pool._work_queue.qsize() <= 4 * 4  # of the 160 tasks; those begun are not stopped
    assert len(list(train.train_batches(train_indices(7, 2, 0, 0), 0, 32))) == 3


@needs_ffcv
def test_an_image_that_cannot_be_decoded_is_named_where_ffcv_would_hand_out_rubbish(with_ffcv_files):
    path = with_ffcv_files.root / "train.beton"
    beton = opened(path)
    row = int(np.flatnonzero(beton.is_jpeg)[0])
    with path.open("r+b") as file:
        file.seek(int(beton.starts[row]))
        file.write(bytes(16))
    train = build_data(with_ffcv_files.config(), 0, CPU, is_main=False)["train"]
    with pytest.raises(UserError, match=f"^image {row} in {path} cannot be decoded; write train.beton anew"):
        list(train.train_batches(train_indices(7, 1, 0, 0), 0, 32))


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


def empty(path):
    path.write_bytes(b"")


def other_version(path):
    path.write_bytes(b"\x07" + path.read_bytes()[1:])


def other_classes(path):
    description = json.loads(Path(f"{path}.json").read_text())
    description["classes"], description["counts"] = ["a", "b", "c"], [1, 3, 1]
    Path(f"{path}.json").write_text(json.dumps(description))


def no_description(path):
    Path(f"{path}.json").unlink()


def bad_description(path):
    Path(f"{path}.json").write_text("{}")


def zeroed_table(path):
    content = path.read_bytes()
    path.write_bytes(content[:-24] + bytes(24))


def more_fields(path):
    path.write_bytes(path.read_bytes()[:2] + b"\xff\xff" + path.read_bytes()[4:])


@needs_ffcv
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut, r"val.beton has [\d,]+ bytes, not the [\d,]+ that val.beton.json says: it is cut short or another file"),
        (empty, r"val.beton has 0 bytes, not the [\d,]+ that val.beton.json says"),
        (other_version, r"val.beton is no FFCV file of version 2, .* \(its header says 7\)"),
        (other_classes, r"val.beton does not hold the classes that val.beton.json says"),
        (no_description, r"val.beton.json is missing, which names the classes of val.beton"),
        (bad_description, r"val.beton.json cannot be read"),
        (zeroed_table, r"val.beton is damaged"),
        (more_fields, r"val.beton is damaged"),
    ],
)
def test_a_bad_file_is_refused_with_what_to_do(with_ffcv_files, spoil, message):
    spoil(with_ffcv_files.root / "val.beton")
    with pytest.raises(UserError, match=f"{message}.*; write val.beton anew with python -m mrl.data.write_ffcv$"):
        build_data(with_ffcv_files.config(backend="ffcv"), 0, CPU)


@needs_ffcv
def test_files_of_other_classes_are_refused(with_ffcv_files):
    description = read_description(with_ffcv_files.root / "val.beton")
    renamed = dataclasses.replace(description, classes=["a", "z"])
    (with_ffcv_files.root / "val.beton.json").write_text(renamed.to_json())
    with pytest.raises(UserError, match="differ: only in train: b; only in val: z"):
        build_data(with_ffcv_files.config(), 0, CPU)
    with pytest.raises(UserError, match=r"data.num_classes is 3, but the train split has 2 classes"):
        build_data(with_ffcv_files.config(num_classes=3), 0, CPU, splits=("train",))


@needs_ffcv
def test_auto_takes_the_files_that_are_there_and_says_so(with_ffcv_files, capsys):
    build_data(with_ffcv_files.config(num_workers=2), 0, CPU)
    build_data(with_ffcv_files.config(backend="folder"), 0, CPU)
    (with_ffcv_files.root / "val.beton").unlink()
    build_data(with_ffcv_files.config(), 0, CPU)
    build_data(with_ffcv_files.config(num_workers=2), 0, CPU, splits=("train",))
    assert capsys.readouterr().out.splitlines() == [
        "data: folder, train 7 + val 5 images of 2 classes, ffcv backend "
        "(auto: train.beton and val.beton found, 2 threads)",
        "data: folder, train 7 + val 5 images of 2 classes, folder backend (as data.backend says, 0 worker processes)",
        "data: folder, train 7 + val 5 images of 2 classes, folder backend (auto: set of any size, 0 worker processes)",
        "data: folder, train 7 images of 2 classes, ffcv backend (auto: train.beton found, 2 threads)",
    ]
    with pytest.raises(UserError, match=r"val.beton is missing; write it with .* --root .*images --split val, or use"):
        build_data(with_ffcv_files.config(backend="ffcv"), 0, CPU)


@pytest.fixture
def no_ffcv(two_classes, monkeypatch):
    """`two_classes` with files that look like FFCV's, and no FFCV to import."""
    for name in [name for name in sys.modules if name.split(".")[0] == "ffcv"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ffcv", None)
    description = Description("val", ["a", "b"], [2, 3], 5, {})
    for split in ("train", "val"):
        (two_classes.root / f"{split}.beton").write_bytes(b"12345")
        (two_classes.root / f"{split}.beton.json").write_text(description.to_json())
    return two_classes


def test_without_ffcv_auto_takes_the_folder_and_says_why(no_ffcv, capsys):
    images = build_data(no_ffcv.config(), 0, CPU)
    assert isinstance(images["val"], FolderImages)
    reason = "auto: FFCV cannot be imported, so train.beton and val.beton cannot be read"
    assert f"folder backend ({reason}, 0 worker processes)" in capsys.readouterr().out


@pytest.mark.parametrize("backend", ["ffcv", "auto"])
def test_without_ffcv_the_error_says_what_to_install(no_ffcv, backend):
    if backend == "auto":  # and nothing else to read
        (no_ffcv.root / "train").rename(no_ffcv.root / "elsewhere")
    message = "FFCV cannot be imported .*; install it .apt-get install .* libopencv-dev libturbojpeg0-dev, then pip "
    with pytest.raises(UserError, match=message):
        build_data(no_ffcv.config(backend=backend), 0, CPU)


@needs_ffcv
@pytest.mark.shared
def test_photographs_are_evaluated_alike(tmp_path):
    """Full-size photographs: the very same pixels, but for those that the writer has shrunk to 500 px."""
    with tarfile.open(SHARED / "imagenet-sample-100" / "images.tar.gz") as tar:
        members = [member for member in tar.getmembers() if member.isfile()][::5]
        for member in members:
            path = tmp_path / "val" / Path(member.name).parent.name / Path(member.name).name
            path.parent.mkdir(parents=True)
            path.write_bytes(tar.extractfile(member).read())
    write_split(tmp_path, "val")
    parts = [
        build_data(DataConfig(name="folder", root=str(tmp_path), backend=b), 0, CPU, False, splits=("val",))["val"]
        for b in ("folder", "ffcv")
    ]
    (folder, labels), (ffcv, ffcv_labels) = (stacked(part.eval_batches(eval_indices(20, 8))) for part in parts)
    assert torch.equal(labels, ffcv_labels) and labels.tolist() == list(range(20))
    sizes = [max(Image.open(path).size) for path in list_images(tmp_path, "val").paths]
    off = (folder - ffcv).abs().mean(dim=(1, 2, 3)) / LEVEL
    for size, levels in zip(sizes, off.tolist(), strict=True):
        assert levels == 0 if size <= 500 else levels < 10
    assert sum(size <= 500 for size in sizes) >= 10
