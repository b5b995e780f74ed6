"""Listing, decoding, and worker processes."""

import multiprocessing
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchcodec.encoders import JpegEncoder, PngEncoder

from mrl.data import build_data
from mrl.data.folder import decode, describe_left_out, list_images, warn_once
from mrl.data.transforms import train_indices
from mrl.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def test_images_are_listed_by_class_then_path_and_other_files_counted(tmp_path):
    """Names of any bytes, links to classes; hidden files are not counted."""
    strange, latin = os.fsdecode(b"caf\xe9\n1.jpg"), os.fsdecode(b"caf\xe9")
    touch(tmp_path / "train", "b/2.png", "b/10.JPEG", "a/x.jpg", "a/deeper/y.webp", f"a/{strange}", f"{latin}/z.PNG")
    touch(tmp_path / "train", "a/notes.txt", "a/Thumbs.db", "a/.2.png", "a/.DS_Store", "readme.md")
    touch(tmp_path / "elsewhere", "5.jpg")
    (tmp_path / "train" / "z").symlink_to(tmp_path / "elsewhere")
    found = list_images(tmp_path, "train")
    expected = [f"a/{strange}", "a/x.jpg", "a/deeper/y.webp", "b/10.JPEG", "b/2.png", f"{latin}/z.PNG", "z/5.jpg"]
    assert found.paths == [str(tmp_path / "train" / name) for name in expected]
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 2, 3] and found.labels.dtype == torch.int64
    assert found.classes == ["a", "b", "caf\\xe9", "z"]
    assert describe_left_out(found.left_out) == "; left out: 3 files of other types (.db, .md, .txt)"


def test_a_link_to_a_folder_that_it_is_in_is_refused(tmp_path):
    """Followed 40 times, it would put the images of all classes into one; two would list 2^40 folders."""
    touch(tmp_path / "train", "a/1.png", "b/2.png")
    (tmp_path / "train" / "b" / "up").symlink_to("..")
    with pytest.raises(UserError, match=f"^{tmp_path}/train/b/up is a link to {tmp_path}/train, which it is in itself"):
        list_images(tmp_path, "train")
    (tmp_path / "train" / "b" / "up").unlink()
    touch(tmp_path, "one/x.png", "other/y.png")  # which lead into each other
    for link, place in (("one/to", "other"), ("other/to", "one"), ("train/c", "one")):
        (tmp_path / link).symlink_to(tmp_path / place)
    with pytest.raises(UserError, match=f"^{tmp_path}/train/c/to/to is a link to {tmp_path}/one, which it is in"):
        list_images(tmp_path, "train")


TOOL_NAMES = """
@eaDir .thumbnails __MACOSX lost+found $RECYCLE.BIN .ipynb_checkpoints Thumbs thumbnails _thumbs #recycle @Recycle
#snapshot ~snapshot .snapshot .@__thumb .Trash-1000 .Trashes .AppleDouble .git .svn __pycache__ FOUND.000 LOST.DIR
RECYCLER Previews.lrdata PaxHeader PaxHeaders.1234 CaptureOne _gsdata_
"""


def test_folders_of_tools_are_skipped_and_counted_at_any_depth(tmp_path):
    tools = [*TOOL_NAMES.split(), "System Volume Information"]
    touch(tmp_path / "train", "a/1.png", "b/2.png", "b/deep/3.png")
    for tool in tools:
        touch(tmp_path / "train", f"{tool}/a/1.png", f"b/{tool}/2.png/thumb.jpg", f"b/deep/{tool}/3.png")
    found = list_images(tmp_path, "train")
    assert found.classes == ["a", "b"] and len(found.paths) == 3
    assert describe_left_out(found.left_out).startswith(f"; left out: {3 * len(tools)} folders of tools (")


def test_classes_one_or_more_folders_deeper_are_refused_with_the_tree_they_should_be_in(tmp_path):
    for depth in ("images", "all/images"):
        root = tmp_path / depth.replace("/", "_")
        touch(root / "train", f"{depth}/cat/1.png", f"{depth}/dog/2.png")
        message = f"{root}/train must hold one folder per class, but it holds a single one, {depth}, with the folders"
        with pytest.raises(UserError, match=f"{message} cat, dog in it; .*{root}/train/cat/"):
            list_images(root, "train")
    touch(tmp_path / "c" / "photos" / "train", "a/1.png", "b/1.png")
    with pytest.raises(UserError, match=f"if you mean the one in {tmp_path}/c/photos, give that folder$"):
        list_images(tmp_path / "c", "train")
    touch(tmp_path / "c" / "__MACOSX" / "photos" / "train", "a/1.png")
    with pytest.raises(UserError, match=f"if you mean the one in {tmp_path}/c/photos, give"):
        list_images(tmp_path / "c", "train")
    nearest, farther = "many/folders/above/it", "a/fifth/folder/above/it"
    touch(tmp_path / "e", f"{nearest}/train/a/1.png", f"{farther}/train/a/1.png")
    with pytest.raises(UserError, match=f"if you mean the one in {tmp_path}/e/{nearest}, give"):
        list_images(tmp_path / "e", "train")
    touch(tmp_path / "d" / "train", "a/deep/1.png", "b/deep/1.png")  # classes may have folders of their own
    assert list_images(tmp_path / "d", "train").classes == ["a", "b"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("later", [("cat", "dog"), ("bird", "eel/indoors")])
def test_classes_below_several_folders_are_said_because_they_may_be_meant(tmp_path, later):
    first, second = later
    touch(tmp_path / "train", "2019/cat/1.png", "2019/dog/1.png", f"2020/{first}/1.png", f"2020/{second}/1.png")
    folders = ", ".join(sorted({"cat", "dog", first, second.split("/")[0]}))
    message = f"folders of .*train, 2019, 2020, hold no images of their own, only folders, {folders}; if those are"
    with pytest.warns(UserWarning, match=message):
        assert list_images(tmp_path, "train", show_progress=True).classes == ["2019", "2020"]
    touch(tmp_path / "train", "2020/1.png")
    list_images(tmp_path, "train", show_progress=True)  # without a warning, which would be an error


def test_images_beside_class_folders_are_counted_and_refused_where_they_are_most(tmp_path):
    touch(tmp_path / "train", "a/1.png", "b/2.png", "3.png", "4.png")
    found = list_images(tmp_path, "train")
    assert describe_left_out(found.left_out) == "; left out: 2 images beside the class folders"
    touch(tmp_path / "train", "5.png")
    with pytest.raises(UserError, match="train has 3 images beside its class folders and only 2 in them"):
        list_images(tmp_path, "train")


def test_class_names_are_compared_in_one_unicode_form(tmp_path):
    touch(tmp_path / "train", "caf\u00e9/1.png", "zebra/1.png")
    touch(tmp_path / "val", "cafe\u0301/1.png", "zebra/1.png")
    train, val = (list_images(tmp_path, split) for split in ("train", "val"))
    assert train.classes == val.classes == ["caf\u00e9", "zebra"]
    assert val.paths[0] == f"{tmp_path}/val/cafe\u0301/1.png"
    touch(tmp_path / "val", "caf\u00e9/2.png")
    with pytest.raises(UserError, match=r"val has two folders for one class, .*'cafe\\u0301'.*; join them"):
        list_images(tmp_path, "val")


@pytest.mark.parametrize(
    ("files", "split", "message"),
    [
        ([], "train", "data.root is '{root}', which is not a folder"),
        (["train/a/1.png", "valid/a/1.png"], "val", "^{root}/val is missing; .* holds train, valid; .*val_share"),
        (["train/1.png", "train/2.png"], "train", "train has no class folders, only 1.png, 2.png; put the images into"),
        (["train/a/1.png", "train/b/x.txt"], "train", "class folder {root}/train/b has no images; allowed: .jpg"),
    ],
)
def test_what_is_missing_is_named(tmp_path, files, split, message):
    touch(tmp_path / "root", *files)
    with pytest.raises(UserError, match=message.format(root=tmp_path / "root")):
        list_images(tmp_path / "root", split)


def colors():
    return np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)


@pytest.mark.parametrize("extension", ["png", "bmp", "tiff", "ppm"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_lossless_formats_are_read_exactly(tmp_path, extension, mode):
    image = Image.fromarray(colors()).convert(mode)
    image.save(tmp_path / f"image.{extension}")
    expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(decode(str(tmp_path / f"image.{extension}")).numpy(), expected)


def transparent(mode):
    """Return a drawing that is black where it is opaque, with black or other colors hidden where it is not."""
    if mode == "P":
        image = Image.fromarray(np.array([[0, 1], [1, 1]], dtype=np.uint8), mode="P")
        image.putpalette([0, 0, 0, 9, 9, 9])
        image.info["transparency"] = 1
        return image
    pixels = np.zeros((2, 2, 4), dtype=np.uint8)
    pixels[0, 0, 3] = 255
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize(
    ("mode", "extension"),
    [("RGBA", "png"), ("LA", "png"), ("P", "png"), ("RGBA", "webp"), ("RGBA", "tif"), ("P", "gif")],
)
def test_transparency_is_laid_over_white(tmp_path, mode, extension):
    path = tmp_path / f"drawing.{extension}"
    transparent(mode).save(path, **({"lossless": True} if extension == "webp" else {}))
    assert decode(str(path)).tolist() == [[[0, 255], [255, 255]]] * 3


RAMP = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)


@pytest.mark.parametrize(
    ("name", "pixels", "tags"),
    [
        ("png", RAMP, {}),
        ("tif", RAMP, {}),
        ("pgm", RAMP, {}),
        ("tif", (RAMP / 65535).astype(np.float32), {}),
        ("tif", (RAMP.astype(np.uint32) * 65537).view(np.int32), {339: 1}),
        ("tif", 65535 - RAMP, {262: 0}),
    ],
    ids=["png", "tif", "pgm", "float", "32 bits", "white is zero"],
)
def test_images_of_more_than_eight_bits_give_the_same_picture(tmp_path, name, pixels, tags):
    path = tmp_path / f"ramp.{name}"
    Image.fromarray(pixels).save(path)
    for tag, value in tags.items():  # Pillow writes its own
        start = path.read_bytes().index(struct.pack("<HHI", tag, 3, 1)) + 8
        path.write_bytes(path.read_bytes()[:start] + struct.pack("<H", value) + path.read_bytes()[start + 2 :])
    assert decode(str(path)).tolist() == [[[0, 1, 128, 255]]] * 3


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (np.array([[0.0, 255]], dtype=np.float32), "its pixels are floats from 0 to 255; allowed: 0 .black. to 1"),
        (np.array([[0.0, np.nan]], dtype=np.float32), "floats from nan to nan"),
        (np.array([[-5, 900]], dtype=np.int32), "signed integers, of which none is defined as white"),
        (np.array([[251, 90]], dtype=np.uint8), "signed integers, of which none is defined as white"),
        (np.array([[65531, 90]], dtype=np.uint16), "signed integers, of which none is defined as white"),
    ],
)
def test_pixels_without_a_defined_range_are_refused_with_the_path(tmp_path, pixels, reason):
    tags = {339: 2} if pixels.dtype.kind == "u" else {}  # which makes -5 of 251
    Image.fromarray(pixels).save(tmp_path / "x.tif", tiffinfo=tags)
    with pytest.raises(UserError, match=f"^{tmp_path}/x.tif cannot be read as an image: .*{reason}"):
        decode(str(tmp_path / "x.tif"))


@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", [1, 2, 3, 6, 7, 8])
def test_images_are_turned_upright_or_taken_as_stored(tmp_path, extension, orientation):
    stored = np.zeros((16, 32, 3), dtype=np.uint8)
    stored[:8, :16] = 255  # white in one corner
    exif, path = Image.Exif(), str(tmp_path / f"x.{extension}")
    exif[0x112] = orientation
    Image.fromarray(stored).save(path, exif=exif, **({"lossless": True} if extension == "webp" else {}))
    turned = [stored, stored[:, ::-1], stored[::-1, ::-1], stored[::-1]]
    turned += [pixels.swapaxes(0, 1) for pixels in (turned[0], turned[3], turned[2], turned[1])]
    found, as_stored = decode(path, "apply"), decode(path, "ignore")
    np.testing.assert_allclose(found.numpy(), turned[orientation - 1].transpose(2, 0, 1), atol=3)
    np.testing.assert_allclose(as_stored.numpy(), stored.transpose(2, 0, 1), atol=3)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 1}], ids=str)
def test_a_jpeg_without_its_end_marker_is_read_and_one_without_pixels_is_not(tmp_path, options):
    path, noise = tmp_path / "x.jpg", np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, **options)
    whole, content = decode(str(path)), path.read_bytes()
    for ending in (content[:-2], content[:-1]):
        path.write_bytes(ending)
        warn_once.cache_clear()
        with pytest.warns(UserWarning, match="a JPEG file has no end marker, but all of its pixels"):
            assert torch.equal(decode(str(path)), whole)
        assert torch.equal(decode(str(path)), whole)  # without another warning, which would be an error
    for cut in (10, len(content) // 2, len(content)):
        path.write_bytes(content[:-cut])
        with pytest.raises(UserError, match=f"^{path} cannot be read as an image"):
            decode(str(path))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_pass_warns_once_of_jpegs_without_end_markers(two_classes, train, num_workers):
    for path in sorted((two_classes.root / "train" / "a").iterdir()):
        Image.open(path).save(path.with_suffix(".jpg"))
        path.with_suffix(".jpg").write_bytes(path.with_suffix(".jpg").read_bytes()[:-2])
        path.unlink()
    warn_once.cache_clear()
    with pytest.warns(UserWarning) as caught:
        images = train(num_workers)
        for _ in range(2):
            assert len(list(images.train_batches(train_indices(7, 1, 0, 0), 0, 32))) == 7
    assert [str(one.message).startswith("a JPEG file has no end marker") for one in caught] == [True]


def test_pillow_decodes_the_same_pixels_where_torchcodec_cannot_be_loaded(tmp_path, monkeypatch):
    Image.fromarray(colors()).resize((90, 60)).save(tmp_path / "x.jpg")
    found = decode(str(tmp_path / "x.jpg"))
    monkeypatch.setattr("mrl.data.folder.torchcodec", None)
    assert torch.equal(decode(str(tmp_path / "x.jpg")), found)


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


@pytest.fixture
def train(two_classes):
    """Return the 7 training images by the folder backend with a number of workers."""
    return lambda num_workers: build_data(two_classes.config(num_workers=num_workers), 0, CPU, is_main=False)["train"]


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


def test_workers_give_the_same_batches_and_ignore_stop_signals(train):
    indices = [np.array([index % 7]) for index in range(40)]
    batches, alone = (train(number).train_batches(indices, 0, 32) for number in (2, 0))
    before = set(multiprocessing.active_children())
    assert torch.equal(next(batches)[0], next(alone)[0])
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGINT)
    for one, other in zip(batches, alone, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


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
