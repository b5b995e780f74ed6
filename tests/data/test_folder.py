"""Listing, decoding, and worker processes."""

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchcodec.encoders import JpegEncoder, PngEncoder

from mrl.data import build_data
from mrl.data.folder import _start_worker as start_worker
from mrl.data.folder import decode, find_images, list_images
from mrl.data.transforms import train_indices
from mrl.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def test_images_are_listed_by_class_then_path(tmp_path):
    touch(tmp_path / "train", "b/2.png", "b/10.JPEG", "a/x.jpg", "a/deeper/y.webp", "c/z.PNG")
    found = list_images(tmp_path, "train")
    expected = ["a/x.jpg", "a/deeper/y.webp", "b/10.JPEG", "b/2.png", "c/z.PNG"]
    assert found.paths == [str(tmp_path / "train" / name) for name in expected]
    assert found.labels.tolist() == [0, 0, 1, 1, 2] and found.labels.dtype == torch.int64
    assert found.classes == ["a", "b", "c"]
    assert find_images(tmp_path / "train") == expected


def test_stray_files_are_counted_and_hidden_ones_are_not(tmp_path):
    names = "a/1.png", "a/notes.txt", "a/Thumbs.db", "a/.2.png", ".cache/3.png", "a/.thumbs/4.png", "readme.md"
    touch(tmp_path / "train", *names)
    found = list_images(tmp_path, "train")
    assert found.classes == ["a"] and len(found.paths) == 1 and found.num_ignored == 2


def test_names_of_any_bytes_are_listed_and_linked_classes_followed(tmp_path):
    name = os.fsdecode(b"caf\xe9\n1.jpg")  # Latin-1, and a line break
    touch(tmp_path / "train", f"a/{name}")
    touch(tmp_path / "elsewhere", "5.jpg")
    (tmp_path / "train" / "b").symlink_to(tmp_path / "elsewhere")
    assert list_images(tmp_path, "train").paths == [f"{tmp_path}/train/a/{name}", f"{tmp_path}/train/b/5.jpg"]


@pytest.mark.parametrize(
    ("files", "split", "message"),
    [
        ([], "train", "data.root is '{root}', which is not a folder"),
        (["train/a/1.png", "valid/a/1.png"], "val", "^{root}/val is missing; .* holds train, valid$"),
        ([f"{name}/a/1.png" for name in "abcdefgh"], "val", "holds a, b, c, d, e and 3 more"),
        (["train/1.png", "train/2.png"], "train", "train has no class folders, only 1.png, 2.png; put the images into"),
        (["train/.hidden"], "train", "train has no class folders, only nothing; put the images into"),
        (["train/a/1.png", "train/b/x.txt"], "train", "class folder {root}/train/b has no images; allowed: .jpg"),
    ],
)
def test_what_is_missing_is_named(tmp_path, files, split, message):
    touch(tmp_path / "root", *files)
    with pytest.raises(UserError, match=message.format(root=tmp_path / "root")):
        list_images(tmp_path / "root", split)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path):
    with pytest.raises(UserError, match=f"^{tmp_path}/gone cannot be listed: No such file or directory$"):
        find_images(tmp_path / "gone")


def colors():
    return np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)


@pytest.mark.parametrize("extension", ["png", "bmp", "tiff", "ppm"])
def test_lossless_formats_are_read_exactly(tmp_path, extension):
    path = tmp_path / f"image.{extension}"
    Image.fromarray(colors()).save(path)
    assert np.array_equal(decode(str(path)).numpy(), colors().transpose(2, 0, 1))


def test_gray_palette_and_transparent_images_become_rgb(tmp_path):
    picture = Image.fromarray(colors())
    transparent = picture.copy()
    transparent.putalpha(7)
    gray, palette = picture.convert("L"), picture.convert("P")
    for image, expected in ((gray, gray.convert("RGB")), (palette, palette.convert("RGB")), (transparent, picture)):
        image.save(tmp_path / "image.png")
        assert np.array_equal(decode(str(tmp_path / "image.png")).numpy(), np.asarray(expected).transpose(2, 0, 1))


def test_sixteen_bit_images_keep_their_upper_eight_bits(tmp_path):
    values = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    assert decode(str(tmp_path / "deep.png"))[0].tolist() == [[0, 0, 1, 128, 255]]


def test_cmyk_jpegs_and_pngs_called_jpeg_are_read(tmp_path):
    # Both occur in ImageNet.
    Image.new("CMYK", (32, 32), (0, 255, 255, 0)).save(tmp_path / "cmyk.JPEG")
    image = decode(str(tmp_path / "cmyk.JPEG"))
    assert image.shape == (3, 32, 32) and image.dtype == torch.uint8
    red, green, blue = image.float().mean(dim=(1, 2)).tolist()
    assert red > 200 and green < 60 and blue < 60
    path = tmp_path / "n02105855_2933.JPEG"
    path.write_bytes(PngEncoder(torch.from_numpy(colors()).permute(2, 0, 1)).to_tensor().numpy().tobytes())
    assert np.array_equal(decode(str(path)).numpy(), colors().transpose(2, 0, 1))


def test_a_jpeg_is_decoded_as_pil_does_to_within_rounding(tmp_path):
    path = tmp_path / "é 1.jpg"
    smooth = torch.nn.functional.interpolate(torch.rand(1, 3, 5, 5) * 255, (40, 60))[0].to(torch.uint8)
    JpegEncoder(smooth).to_file(path)
    expected = np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1).astype(int)
    assert abs(decode(str(path)).numpy() - expected).max() <= 3


def test_a_file_that_is_gone_is_named(tmp_path):
    with pytest.raises(UserError, match=f"^{tmp_path}/gone.png cannot be read as an image"):
        decode(str(tmp_path / "gone.png"))


@pytest.fixture
def train(two_classes):
    """Return the 7 training images by the folder backend with a number of workers."""
    return lambda num_workers: build_data(two_classes.config(num_workers=num_workers), 0, CPU, is_main=False)["train"]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_number_of_workers_changes_nothing(train, num_workers):
    batches = train_indices(7, 2, 0, 0)
    both = (train(number).train_batches(batches, 0, 32) for number in (0, num_workers))
    for one, other in zip(*both, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("content", [b"not an image", b"", None], ids=["text", "empty", "truncated"])
def test_a_corrupt_image_names_its_path_and_ends_the_workers(two_classes, train, num_workers, content):
    path = two_classes.root / "train" / "b" / "1.jpg"
    (path.parent / "1.png").unlink()
    if content is None:
        whole = JpegEncoder(torch.randint(0, 256, (3, 48, 48), dtype=torch.uint8)).to_tensor().numpy().tobytes()
        content = whole[: len(whole) // 2]
    path.write_bytes(content)
    before = set(multiprocessing.active_children())
    with pytest.raises(UserError, match="cannot be read as an image") as raised:
        list(train(num_workers).train_batches(train_indices(7, 1, 0, 0), 0, 32))
    assert str(raised.value).startswith(str(path)) and "Traceback" not in str(raised.value)
    assert raised.value.__traceback__ is not None  # which holds on to the frames that it went through
    assert set(multiprocessing.active_children()) <= before
    with pytest.raises(UserError, match=str(path)):
        build_data(two_classes.config(backend="memory"), 0, CPU, is_main=False)


def test_workers_ignore_stop_signals(train):
    batches = train(2).train_batches([np.array([index % 7]) for index in range(40)], 0, 32)
    before = set(multiprocessing.active_children())
    next(batches)
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGINT)
    assert len(list(batches)) == 39


def test_workers_that_are_still_starting_ignore_stop_signals(train, monkeypatch):
    def stopped_at_once(worker):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        start_worker(worker)

    monkeypatch.setattr("mrl.data.folder._start_worker", stopped_at_once)
    assert len(list(train(2).train_batches([np.array([index]) for index in range(7)], 0, 32))) == 7


def test_a_process_ends_although_a_pass_is_unfinished(two_classes):
    """Workers ignore the SIGTERM that multiprocessing sends them at exit; it would wait for them forever."""
    program = (
        "import sys, torch; from mrl.config import DataConfig; from mrl.data import build_data\n"
        "config = DataConfig(name='folder', root=sys.argv[1], num_workers=2)\n"
        "images = build_data(config, 0, torch.device('cpu'), is_main=False)['train']\n"
        "batches = images.train_batches([[0], [1], [2], [3]], 0, 32); next(batches); print('unfinished')\n"
    )
    command = [sys.executable, "-c", program, two_classes.root]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, "unfinished\n", "")
