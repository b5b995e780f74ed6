import json
import os

import numpy as np
import pytest
import torch
from torchvision.io import encode_jpeg, write_png

from mrl.data import write_ffcv
from mrl.data.ffcv import Description, FFCVFile, read_description
from mrl.data.folder import list_images, read_image
from mrl.data.write_ffcv import Settings, main, write
from mrl.errors import UserError

needs_ffcv = pytest.mark.ffcv


def files(root):
    return sorted(path.name for path in root.iterdir() if path.is_file())


def shared_memory():
    return set(os.listdir("/dev/shm"))


@pytest.fixture
def root(image_folder):
    return image_folder({"train": {"cat": 3, "dog": 4}, "val": {"cat": 1, "dog": 2}}, size=(30, 44))


@needs_ffcv
def test_a_flat_validation_folder_of_imagenet_gets_the_classes_of_its_ground_truth(image_folder):
    root = image_folder({"all": {"n01440764": 1, "n02102040": 2}}, size=(30, 44))
    (root / "val").mkdir()
    for number, name in enumerate(["n02102040/0", "n01440764/0", "n02102040/1"]):
        (root / "all" / f"{name}.png").rename(root / "val" / f"{number}.png")
    (root / "val_wnids.txt").write_text("0 n02102040\n1 n01440764\n2 n02102040\n")
    assert main(["--root", str(root), "--split", "val", "--name", "imagenet"]) == 0
    beton = FFCVFile(root / "val.beton", read_description(root / "val.beton"))
    assert (beton.classes, beton.labels.tolist()) == (["n01440764", "n02102040"], [0, 1, 1])
    pixels = read_image(str(root / "val" / "1.png")).permute(1, 2, 0).numpy()
    assert np.array_equal(beton.decode(0, beton.scratch()), pixels)


@needs_ffcv
def test_the_defaults_are_the_papers(root, capsys):
    """Longer side up to 500 px, half of the training images as JPEG of quality 90, validation images raw."""
    for split in ("train", "val"):
        assert main(["--root", str(root), "--split", split]) == 0
    assert files(root) == ["train.beton", "train.beton.json", "val.beton", "val.beton.json"]
    train, val = (json.loads((root / f"{split}.beton.json").read_text()) for split in ("train", "val"))
    assert train["settings"] == {"max_px": 500, "jpeg_share": 0.5, "quality": 90}
    assert val["settings"] == {"max_px": 500, "jpeg_share": 0.0, "quality": 90}
    assert (train["classes"], train["counts"], val["counts"]) == (["cat", "dog"], [3, 4], [1, 2])
    assert train["num_bytes"] == (root / "train.beton").stat().st_size
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(f"{root}/train.beton: 7 images of 2 classes, ")
    beton = FFCVFile(root / "train.beton", Description(**train))
    assert beton.is_jpeg.tolist() == [False, True, False, True, False, True, False]
    assert beton.labels.tolist() == [0, 0, 0, 1, 1, 1, 1] and beton.labels.dtype == torch.int64


@needs_ffcv
def test_raw_images_are_stored_pixel_by_pixel_and_jpegs_close_to_it(root):
    images = list_images(root, "train")
    write(images, "train", root / "mix.beton", Settings(jpeg_share=0.5, quality=95), 2)
    beton = FFCVFile(root / "mix.beton", read_description(root / "mix.beton"))
    for row, path in enumerate(images.paths):
        expected = read_image(path).permute(1, 2, 0).numpy()
        found = beton.decode(row, beton.scratch())
        assert found.shape == (30, 44, 3)
        if beton.is_jpeg[row]:
            assert bytes(beton.stored(row)[:2]) == b"\xff\xd8"
            assert np.abs(found.astype(int) - expected).mean() < 10
        else:
            assert np.array_equal(found, expected)


@pytest.mark.parametrize("share", [0, 0.1, 1 / 3, 0.5, 0.9, 1])
def test_jpegs_are_spread_evenly(share):
    chosen = np.cumsum([Settings(jpeg_share=share).is_jpeg(row) for row in range(1000)])
    assert np.abs(chosen - share * np.arange(1, 1001)).max() <= 1


@needs_ffcv
def test_large_images_are_shrunk_by_averaging_and_small_ones_kept(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    large = torch.randint(256, (3, 80, 160), dtype=torch.uint8)
    write_png(large, str(tmp_path / "train" / "a" / "1.png"))
    write_png(large[:, :20, :30], str(tmp_path / "train" / "a" / "2.png"))
    write(list_images(tmp_path, "train"), "train", tmp_path / "a.beton", Settings(40, jpeg_share=0), 1)
    beton = FFCVFile(tmp_path / "a.beton", read_description(tmp_path / "a.beton"))
    assert list(zip(beton.heights, beton.widths, strict=True)) == [(20, 40), (20, 30)]
    averaged = large.float().reshape(3, 20, 4, 40, 4).mean(dim=(2, 4)).permute(1, 2, 0)
    assert np.abs(beton.decode(0, beton.scratch()) - averaged.numpy()).max() <= 0.51


@needs_ffcv
def test_the_file_does_not_depend_on_the_number_of_threads(root):
    for threads in (1, 3):
        write(list_images(root, "train"), "train", root / f"{threads}.beton", Settings(), threads)
    assert (root / "1.beton").read_bytes() == (root / "3.beton").read_bytes()


@needs_ffcv
@pytest.mark.filterwarnings("ignore")  # of numba and of Python, about FFCV
def test_ffcvs_own_loader_reads_the_file_and_we_read_its_writers(root):
    """Both directions, many images on several pages."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.writer import DatasetWriter

    images = list_images(root, "train")
    pixels = [read_image(path).permute(1, 2, 0).numpy() for path in images.paths]
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
    beton = FFCVFile(theirs, Description("train", ["cat", "dog"], [3, 4], theirs.stat().st_size, {}))
    assert beton.labels.tolist() == images.labels.tolist()
    assert all(np.array_equal(beton.decode(row, beton.scratch()), pixels[row]) for row in range(7))


def text_instead_of_an_image(root, monkeypatch):
    (root / "train" / "dog" / "2.png").write_text("no image")
    return "/train/dog/2.png cannot be read as an image"


def an_image_that_would_shrink_to_nothing(root, monkeypatch):
    write_png(torch.zeros(3, 1, 2000, dtype=torch.uint8), str(root / "train" / "dog" / "2.png"))
    return "/train/dog/2.png cannot be stored at --max_px 500"


def a_full_disk(root, monkeypatch):
    from ffcv.memory_allocator import MemoryAllocator

    def fail(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(MemoryAllocator, "flush_page", fail)
    return "train.beton failed, nothing was left there: .*No space left on device"


def a_disk_that_loses_bytes(root, monkeypatch):
    import ffcv.writer

    finalize = ffcv.writer.DatasetWriter.finalize

    def finalize_and_lose(self, allocations):
        finalize(self, allocations)
        with open(self.fname, "r+b") as file:
            file.seek(int(allocations[4][1]) + 100)
            file.write(bytes(100))

    monkeypatch.setattr(ffcv.writer.DatasetWriter, "finalize", finalize_and_lose)
    return "/train/dog/1.png was written as other bytes than it should"


@needs_ffcv
@pytest.mark.parametrize(
    "spoil", [text_instead_of_an_image, an_image_that_would_shrink_to_nothing, a_full_disk, a_disk_that_loses_bytes]
)
def test_what_fails_is_named_and_leaves_nothing(root, monkeypatch, capsys, spoil):
    message, memory = spoil(root, monkeypatch), shared_memory()
    assert main(["--root", str(root), "--split", "train"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    with pytest.raises(UserError, match=message):
        write(list_images(root, "train"), "train", root / "train.beton", Settings(), 2)
    assert files(root) == [] and shared_memory() <= memory


@needs_ffcv
def test_ctrl_c_leaves_nothing(root, monkeypatch, capsys):
    encode, calls = write_ffcv.encode, []

    def interrupted(path, settings, as_jpeg):
        calls.append(path)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return encode(path, settings, as_jpeg)

    monkeypatch.setattr(write_ffcv, "encode", interrupted)
    assert main(["--root", str(root), "--split", "train", "--num_threads", "1"]) == 130
    assert capsys.readouterr().err == f"stopped; nothing was left at {root}/train.beton\n"
    assert files(root) == []


@needs_ffcv
def test_what_a_killed_writer_left_is_no_obstacle_and_a_finished_file_is_kept(root, capsys):
    (root / ".val.beton.unfinished").write_bytes(b"half")
    (root / "val.beton.json").write_text("old")
    assert main(["--root", str(root), "--split", "val"]) == 0
    before = (root / "val.beton").read_bytes()
    assert files(root) == ["val.beton", "val.beton.json"]
    assert main(["--root", str(root), "--split", "val"]) == 2
    assert "val.beton already exists; remove it, or give another --out" in capsys.readouterr().err
    assert (root / "val.beton").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max_px", "31"], "--max_px is 31; allowed: 32 to 8192"),
        (["--jpeg_share", "1.5"], "--jpeg_share is 1.5; allowed: 0"),
        (["--quality", "0"], "--quality is 0; allowed: 1 to 100"),
        (["--num_threads", "0"], "--num_threads is 0; allowed: 1 or more"),
        pytest.param(["--root", "nowhere"], "data.root is 'nowhere', which is not a folder", marks=needs_ffcv),
    ],
)
def test_bad_settings_are_refused(root, capsys, words, message):
    assert main(["--root", str(root), "--split", "train", *words]) == 2
    assert message in capsys.readouterr().err
    assert files(root) == []


@needs_ffcv
def test_pages_are_large_enough_for_any_image(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    path = tmp_path / "train" / "a" / "1.jpg"
    path.write_bytes(encode_jpeg(torch.zeros(3, 1800, 1800, dtype=torch.uint8)).numpy().tobytes())
    written = write(list_images(tmp_path, "train"), "train", tmp_path / "a.beton", Settings(2000, jpeg_share=0), 1)
    assert written.num_bytes > 3 * 1800**2 > write_ffcv.MIN_PAGE_BYTES
    beton = FFCVFile(tmp_path / "a.beton", written)
    assert np.array_equal(beton.decode(0, beton.scratch()), np.zeros((1800, 1800, 3)))
