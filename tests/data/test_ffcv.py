"""FFCV files: writing, reading, and what is wrong with them. tests/data/test_build_data.py compares the batches."""

import dataclasses
import json
import os
import re
import signal
import threading
import time
from multiprocessing import shared_memory
from pathlib import Path

import numpy as np
import pytest
import torch
from torchcodec.encoders import JpegEncoder, PngEncoder

from mrl.data import build_data, write_ffcv
from mrl.data.ffcv import FFCVFile, FFCVImages
from mrl.data.folder import decode, list_images
from mrl.data.transforms import train_indices
from mrl.data.write_ffcv import Settings, main, write
from mrl.errors import UserError

CPU = torch.device("cpu")
pytestmark = pytest.mark.ffcv


def write_split(root, split, jpeg_share=0.0, **settings):
    return write(list_images(root, split), split, root / f"{split}.beton", Settings(500, jpeg_share, **settings), 2)


def names(root):
    return sorted(path.name for path in root.iterdir() if path.is_file())


@pytest.fixture
def with_ffcv_files(two_classes):
    """`two_classes` with its two .beton files, half JPEG and raw."""
    write_split(two_classes.root, "train", 0.5, quality=95)
    write_split(two_classes.root, "val")
    return two_classes


@pytest.fixture
def root(image_folder):
    return image_folder({"train": {"cat": 3, "dog": 4}, "val": {"cat": 1, "dog": 2}}, size=(30, 44))


def test_a_crop_is_resampled_by_averaging_areas(with_ffcv_files, transform):
    plain = dataclasses.replace(transform, crop_scale=(1, 1), crop_ratio=(1, 1), mean=(0, 0, 0), std=(1, 1, 1))
    images = FFCVImages(FFCVFile(with_ffcv_files.root / "val.beton"), plain, CPU, 1)
    [(whole, _)] = images.train_batches([np.arange(5)], 0, 48)
    [(quarters, _)] = images.train_batches([np.arange(5)], 0, 24)
    expected = whole.reshape(5, 3, 24, 2, 24, 2).mean(dim=(3, 5))
    assert (quarters - expected).abs().max() * 255 <= 0.51


def test_passes_leave_no_threads_behind(with_ffcv_files):
    before = set(threading.enumerate())
    train = build_data(with_ffcv_files.config(num_workers=3), 0, CPU, is_main=False)["train"]
    for _ in range(10):
        batches = train.train_batches([np.full(64, index % 7) for index in range(40)], 0, 32)
        next(batches)
        assert len(set(threading.enumerate()) - before) >= 3
        batches.close()
        assert len(list(train.train_batches(train_indices(7, 2, 0, 0), 0, 32))) == 3
    deadline = time.monotonic() + 10  # they end by themselves, and nobody waits for one that waits for a disk
    while (left := set(threading.enumerate()) - before) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(left) < 10  # of 60; Python's pool may start a thread while it is closed, which then waits forever


def test_fault_17_an_image_that_cannot_be_decoded_is_named_and_not_replaced_by_garbage(with_ffcv_files):
    path = with_ffcv_files.root / "train.beton"
    file = FFCVFile(path)
    index = int(np.flatnonzero(file.is_jpeg)[0])
    content = path.read_bytes()
    path.write_bytes(content.replace(file.stored(index)[:16].tobytes(), bytes(16)))
    train = build_data(with_ffcv_files.config(), 0, CPU, is_main=False)["train"]
    with pytest.raises(UserError, match=rf"^image \d in {path} cannot be decoded; write train.beton again"):
        list(train.train_batches(train_indices(7, 1, 0, 0), 0, 32))


def test_a_file_that_was_written_again_is_known_from_the_one_before(with_ffcv_files):
    """By the store of frozen layers; classes, counts and settings may be the same."""

    def digest():
        return build_data(with_ffcv_files.config(), 0, CPU, is_main=False)["val"].sha256()

    before = digest()
    assert digest() == before
    PngEncoder(torch.zeros(3, 48, 48, dtype=torch.uint8)).to_file(str(with_ffcv_files.root / "val" / "a" / "0.png"))
    (with_ffcv_files.root / "val.beton").unlink()
    write_split(with_ffcv_files.root, "val")
    assert digest() != before


def change_description(path, **changes):
    description = json.loads(Path(f"{path}.json").read_text())
    Path(f"{path}.json").write_text(json.dumps(description | changes))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path, content: path.write_bytes(content[:-1000]), r"has [\d,]+ bytes, but val.beton.json says [\d,]+:"),
        (lambda path, content: path.write_bytes(b"\x07" + content[1:]), r"is damaged or of another version .*file=7"),
        (lambda path, content: path.write_bytes(content[:-24] + bytes(24)), r"is damaged"),
        (lambda path, content: path.write_bytes(content[:2] + b"\xff\xff" + content[4:]), r"is damaged"),
        (
            lambda path, _: change_description(path, classes=list("abc"), counts=[1, 3, 1]),
            r"is damaged .*it has other classes, or images",
        ),
        (lambda path, _: Path(f"{path}.json").unlink(), r".json is missing, which has the class names of val.beton"),
        (lambda path, _: Path(f"{path}.json").write_text("{}"), r".json cannot be read"),
    ],
    ids=["cut", "version", "table", "fields", "classes", "no description", "empty description"],
)
def test_a_bad_file_is_refused_with_what_to_do(with_ffcv_files, spoil, message):
    path = with_ffcv_files.root / "val.beton"
    spoil(path, path.read_bytes())
    with pytest.raises(UserError, match=f"val.beton ?{message}.*; write val.beton again with python -m mrl.data.write"):
        build_data(with_ffcv_files.config(backend="ffcv"), 0, CPU)


def test_auto_uses_ffcv_files_if_they_are_there(with_ffcv_files, capsys):
    build_data(with_ffcv_files.config(num_workers=2), 0, CPU)
    build_data(with_ffcv_files.config(rand_augment="rand-m9"), 0, CPU)
    (with_ffcv_files.root / "val.beton").unlink()
    build_data(with_ffcv_files.config(), 0, CPU)
    build_data(with_ffcv_files.config(num_workers=2), 0, CPU, splits=("train",))
    both = "data: folder, train 7 + val 5 images of 2 classes,"
    assert capsys.readouterr().out.splitlines() == [
        f"{both} ffcv backend (auto: train.beton and val.beton found, 2 threads)",
        f"{both} folder backend (auto: for RandAugment, 0 worker processes)",
        f"{both} folder backend (auto: set of any size, 0 worker processes)",
        "data: folder, train 7 images of 2 classes, ffcv backend (auto: train.beton found, 2 threads)",
    ]
    with pytest.raises(UserError, match=r"val.beton is missing; write it with .* --root .*images --split val, or use"):
        build_data(with_ffcv_files.config(backend="ffcv"), 0, CPU)


def test_the_defaults_are_the_papers(root, capsys):
    """Longer side up to 500 px, half of the training images as JPEG of quality 90, validation images raw."""
    for split in ("train", "val"):
        assert main(["--root", str(root), "--split", split]) == 0
    assert names(root) == ["train.beton", "train.beton.json", "val.beton", "val.beton.json"]
    file, val = FFCVFile(root / "train.beton"), FFCVFile(root / "val.beton")
    rest = {"quality": 90, "exif_rotation": "apply"}
    assert file.description["settings"] == {"max_px": 500, "jpeg_share": 0.5} | rest
    assert val.description["settings"] == {"max_px": 500, "jpeg_share": 0.0} | rest
    assert (file.classes, file.description["counts"], val.description["counts"]) == (["cat", "dog"], [3, 4], [1, 2])
    assert capsys.readouterr().out.startswith(f"{root}/train.beton: 7 images of 2 classes, ")
    assert file.is_jpeg.tolist() == [False, True, False, True, False, True, False]
    assert file.labels.tolist() == [0, 0, 0, 1, 1, 1, 1] and file.labels.dtype == torch.int64


def test_large_images_are_shrunk_by_averaging_and_small_ones_kept(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    large = torch.randint(256, (3, 80, 160), dtype=torch.uint8)
    PngEncoder(large).to_file(str(tmp_path / "train" / "a" / "1.png"))
    PngEncoder(large[:, :20, :30]).to_file(str(tmp_path / "train" / "a" / "2.png"))
    file = write(list_images(tmp_path, "train"), "train", tmp_path / "a.beton", Settings(40, jpeg_share=0), 1)
    assert file.sizes.tolist() == [[20, 40], [20, 30]]
    averaged = large.float().reshape(3, 20, 4, 40, 4).mean(dim=(2, 4)).permute(1, 2, 0)
    assert np.abs(file.decode(0, file.scratch()) - averaged.numpy()).max() <= 0.51


@pytest.mark.filterwarnings("ignore")  # of numba and of Python, about FFCV
def test_ffcvs_own_loader_reads_the_file_and_we_read_its_writers(root):
    """Both directions, many images on several pages."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.writer import DatasetWriter

    images = list_images(root, "train")
    pixels = [decode(path).permute(1, 2, 0).numpy() for path in images.paths]
    write(images, "train", root / "ours.beton", Settings(jpeg_share=0), 2)
    num_threads = torch.get_num_threads()
    loader = Loader(
        str(root / "ours.beton"),
        batch_size=3,
        num_workers=1,
        order=OrderOption.SEQUENTIAL,
        drop_last=False,
        pipelines={"image": [SimpleRGBImageDecoder()]},
    )
    batches = [(np.array(image), labels.flatten().tolist()) for image, labels in loader]
    torch.set_num_threads(num_threads)
    assert np.array_equal(np.concatenate([image for image, _ in batches]), np.stack(pixels))
    assert [label for _, labels in batches for label in labels] == images.labels.tolist()

    theirs = root / "theirs.beton"
    writer = DatasetWriter(str(theirs), {"image": RGBImageField("raw"), "label": IntField()}, num_workers=2)
    writer.from_indexed_dataset(list(zip(pixels, images.labels.tolist(), strict=True)), chunksize=2)
    description = {"classes": ["cat", "dog"], "counts": [3, 4], "num_bytes": theirs.stat().st_size}
    Path(f"{theirs}.json").write_text(json.dumps(description))
    file = FFCVFile(theirs)
    assert file.labels.tolist() == images.labels.tolist()
    assert all(np.array_equal(file.decode(index, file.scratch()), pixels[index]) for index in range(7))


def text_instead_of_an_image(root, monkeypatch):
    (root / "train" / "dog" / "2.png").write_text("no image")
    return "/train/dog/2.png cannot be read as an image"


def an_image_that_would_shrink_to_nothing(root, monkeypatch):
    PngEncoder(torch.zeros(3, 1, 2000, dtype=torch.uint8)).to_file(str(root / "train" / "dog" / "2.png"))
    return "/train/dog/2.png cannot be stored at --max_px 500"


def a_full_disk(root, monkeypatch):
    from ffcv.memory_allocator import MemoryAllocator

    def fail(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(MemoryAllocator, "flush_page", fail)
    return "train.beton failed, nothing was left there: .*No space left on device"


def ctrl_c(root, monkeypatch):
    encode = write_ffcv.encode

    def interrupted(images, settings, index):
        if index == 5:
            os.kill(os.getpid(), signal.SIGINT)  # which Python handles in the main thread
        return encode(images, settings, index)

    monkeypatch.setattr(write_ffcv, "encode", interrupted)
    return f"stopped; nothing was left at {root}/train.beton"


@pytest.mark.parametrize(
    "spoil", [text_instead_of_an_image, an_image_that_would_shrink_to_nothing, a_full_disk, ctrl_c]
)
def test_a_failure_is_named_and_leaves_nothing(root, monkeypatch, capsys, spoil):
    made, real = [], shared_memory.SharedMemory
    monkeypatch.setattr(shared_memory, "SharedMemory", lambda *of, **how: made.append(real(*of, **how)) or made[-1])
    message = spoil(root, monkeypatch)
    assert main(["--root", str(root), "--split", "train"]) == (130 if spoil is ctrl_c else 2)
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 2
    assert names(root) == [] and made and not [one for one in made if (Path("/dev/shm") / one.name).exists()]


def test_the_remains_of_a_killed_writer_are_replaced_and_a_finished_file_is_kept(root, capsys):
    (root / ".val.beton.unfinished").write_bytes(b"half")
    (root / "val.beton.json").write_text("old")
    assert main(["--root", str(root), "--split", "val"]) == 0
    before = (root / "val.beton").read_bytes()
    assert names(root) == ["val.beton", "val.beton.json"]
    assert main(["--root", str(root), "--split", "val"]) == 2
    assert "val.beton already exists; remove it, or give another --out" in capsys.readouterr().err
    assert (root / "val.beton").read_bytes() == before


def test_bad_settings_are_refused(root, capsys):
    for argv, message in (
        (["--max_px", "31"], "--max_px is 31; allowed: 32 to 8192"),
        (["--jpeg_share", "1.5"], "--jpeg_share is 1.5; allowed: 0"),
        (["--root", "nowhere"], "data.root is 'nowhere', which is not a folder"),
    ):
        assert main(["--root", str(root), "--split", "train", *argv]) == 2
        assert message in capsys.readouterr().err
    assert names(root) == []


def test_pages_are_large_enough_for_any_image(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    path = tmp_path / "train" / "a" / "1.jpg"
    path.write_bytes(JpegEncoder(torch.zeros(3, 1800, 1800, dtype=torch.uint8)).to_tensor().numpy().tobytes())
    assert write_ffcv.MIN_PAGE_BYTES < 3 * 1800**2
    file = write(list_images(tmp_path, "train"), "train", tmp_path / "a.beton", Settings(2000, jpeg_share=0), 1)
    assert np.array_equal(file.decode(0, file.scratch()), np.zeros((1800, 1800, 3)))
