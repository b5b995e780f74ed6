import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.io import encode_png, write_jpeg

from mrl.data.folder import list_images, read_image
from mrl.errors import UserError


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")


def test_images_are_listed_by_class_then_path(tmp_path):
    for name in ("b/2.png", "b/10.JPEG", "a/x.jpg", "a/deeper/y.webp", "c/z.PNG"):
        touch(tmp_path / "train" / name)
    found = list_images(tmp_path, "train")
    expected = ["a/x.jpg", "a/deeper/y.webp", "b/10.JPEG", "b/2.png", "c/z.PNG"]
    assert found.paths == [str(tmp_path / "train" / name) for name in expected]
    assert found.labels.tolist() == [0, 0, 1, 1, 2] and found.labels.dtype == torch.int64
    assert found.classes == ["a", "b", "c"]


def test_stray_files_are_counted_and_hidden_ones_are_not(tmp_path):
    for name in ("a/1.png", "a/notes.txt", "a/Thumbs.db", "a/.2.png", ".cache/3.png", "a/.thumbs/4.png", "readme.md"):
        touch(tmp_path / "train" / name)
    found = list_images(tmp_path, "train")
    assert found.classes == ["a"] and len(found.paths) == 1 and found.num_ignored == 2


def test_a_missing_root_is_named(tmp_path):
    with pytest.raises(UserError, match=f"data.root is '{tmp_path}/nowhere', which is not a folder"):
        list_images(tmp_path / "nowhere", "train")


def test_a_missing_split_is_named_with_what_is_there(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "valid").mkdir()
    with pytest.raises(UserError, match=rf"^{tmp_path}/val is missing; .* holds train, valid$"):
        list_images(tmp_path, "val")


def test_many_names_are_cut_short(tmp_path):
    for name in "abcdefgh":
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="holds a, b, c, d, e and 3 more"):
        list_images(tmp_path, "val")


@pytest.mark.parametrize(("files", "there"), [(["1.png", "2.png"], "1.png, 2.png"), ([], "nothing")])
def test_images_without_class_folders_are_refused(tmp_path, files, there):
    (tmp_path / "train").mkdir()
    for name in files:
        touch(tmp_path / "train" / name)
    with pytest.raises(UserError, match=f"holds no class folders but {there}; put the images into"):
        list_images(tmp_path, "train")


def test_an_empty_class_is_named(tmp_path):
    touch(tmp_path / "train" / "a" / "1.png")
    touch(tmp_path / "train" / "b" / "notes.txt")
    with pytest.raises(UserError, match=f"class folder {tmp_path}/train/b holds no images"):
        list_images(tmp_path, "train")


def colors():
    return np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)


@pytest.mark.parametrize("extension", ["png", "bmp", "tiff", "ppm"])
def test_lossless_formats_are_read_exactly(tmp_path, extension):
    path = tmp_path / f"image.{extension}"
    Image.fromarray(colors()).save(path)
    assert np.array_equal(read_image(str(path)).numpy(), colors().transpose(2, 0, 1))


def test_gray_palette_and_transparent_images_become_rgb(tmp_path):
    Image.fromarray(colors()[..., 0]).save(tmp_path / "gray.png")
    for channel in read_image(str(tmp_path / "gray.png")):
        assert np.array_equal(channel.numpy(), colors()[..., 0])
    picture = Image.fromarray(colors())
    picture.convert("P").save(tmp_path / "palette.png")
    expected = np.asarray(picture.convert("P").convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(read_image(str(tmp_path / "palette.png")).numpy(), expected)
    transparent = picture.copy()
    transparent.putalpha(7)
    transparent.save(tmp_path / "transparent.png")
    assert np.array_equal(read_image(str(tmp_path / "transparent.png")).numpy(), colors().transpose(2, 0, 1))


def test_sixteen_bit_images_keep_their_upper_eight_bits(tmp_path):
    values = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    assert read_image(str(tmp_path / "deep.png"))[0].tolist() == [[0, 0, 1, 128, 255]]


def test_cmyk_jpegs_and_pngs_called_jpeg_are_read(tmp_path):
    # Both occur in ImageNet.
    Image.new("CMYK", (32, 32), (0, 255, 255, 0)).save(tmp_path / "cmyk.JPEG")
    image = read_image(str(tmp_path / "cmyk.JPEG"))
    assert image.shape == (3, 32, 32) and image.dtype == torch.uint8
    red, green, blue = image.float().mean(dim=(1, 2)).tolist()
    assert red > 200 and green < 60 and blue < 60
    path = tmp_path / "n02105855_2933.JPEG"
    path.write_bytes(encode_png(torch.from_numpy(colors()).permute(2, 0, 1)).numpy().tobytes())
    assert np.array_equal(read_image(str(path)).numpy(), colors().transpose(2, 0, 1))


def test_a_jpeg_is_decoded_as_pil_does_to_within_rounding(tmp_path):
    path = tmp_path / "é 1.jpg"
    write_jpeg(torch.nn.functional.interpolate(torch.rand(1, 3, 5, 5) * 255, (40, 60))[0].to(torch.uint8), str(path))
    expected = np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1).astype(int)
    assert abs(read_image(str(path)).numpy() - expected).max() <= 3


def test_a_file_that_is_gone_is_named(tmp_path):
    with pytest.raises(UserError, match=f"^{tmp_path}/gone.png cannot be read as an image"):
        read_image(str(tmp_path / "gone.png"))
