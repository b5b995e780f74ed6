"""FFCV files (.beton): images that are decoded by FFCV's library in threads.

We use FFCV's file format, JPEG decoding (libturbojpeg) and area interpolation of training crops (OpenCV), as the paper
did, but not its Loader: that pads validation sets that the processes do not divide, restarts a resumed run with the
order of epoch 0, draws crops per thread, and returns uninitialized memory for an image that cannot be decoded.

Training crops are those of the folder backend; if the writer has shrunk an image, they are drawn on the smaller one.
Evaluation resizes exactly as the folder backend: pixels are equal for images stored raw and in full size.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mrl.data.images import Images, LoadBatch, map_ahead
from mrl.data.transforms import Transform, resize_and_center_crop
from mrl.errors import UserError

INSTALL = (
    "apt-get install build-essential pkg-config libopencv-dev libturbojpeg0-dev, then "
    "pip install -r requirements-ffcv.txt"
)
FIELDS = [("image", "RGBImageField"), ("label", "IntField")]


def import_ffcv() -> Any:
    """Import ``ffcv`` without its change of torch's number of threads."""
    num_threads = torch.get_num_threads()
    try:
        import ffcv.libffcv
        import ffcv.reader
    except (ImportError, OSError) as error:
        raise UserError(
            f"FFCV cannot be imported ({error}); install it ({INSTALL}) or use data.backend folder"
        ) from error
    finally:
        torch.set_num_threads(num_threads)
    return ffcv


class FFCVFile:
    """An FFCV file of images and labels, checked against the description <name>.beton.json beside it.

    Attributes:
        description: split, classes, counts (images per class), num_bytes of the file, and the writer's settings.
        labels: ``(N,)`` int64, positions in ``classes``.
        sizes: ``(N, 2)`` int64, height and width of the images as stored, in pixels.
        is_jpeg: ``(N,)`` bool; False for raw pixels.
        exif_rotation: Whether the images were turned upright: "apply" or "ignore".
    """

    def __init__(self, path: Path):
        ffcv = import_ffcv()
        self.path, self._imdecode = path, ffcv.libffcv.imdecode
        try:
            self.description = json.loads(Path(f"{path}.json").read_text())
            self.classes, expected, described = (self.description[key] for key in ("classes", "counts", "num_bytes"))
        except FileNotFoundError:
            raise self._unusable(f"{path}.json is missing, which has the class names of {path.name}") from None
        except (ValueError, TypeError, KeyError) as error:
            raise self._unusable(f"{path}.json cannot be read ({error!r})") from error
        self.exif_rotation = self.description.get("settings", {}).get("exif_rotation", "ignore")
        num_bytes = path.stat().st_size
        if num_bytes != described:
            has = f"{path} has {num_bytes:,} bytes, but {path.name}.json says {described:,}"
            raise self._unusable(f"{has}: it is cut short or another file")
        try:
            reader = ffcv.reader.Reader(str(path))
            if [(name, type(field).__name__) for name, field in reader.handlers.items()] != FIELDS:
                raise ValueError("its fields are not an image and a label")
            images, labels = reader.metadata["f0"], reader.metadata["f1"].astype(np.int64)
            table = reader.alloc_table[np.argsort(reader.alloc_table["sample_id"])]
            self._starts, self._ends = table["ptr"], table["ptr"] + table["size"]
            self.is_jpeg = images["mode"] == 0
            self.sizes = np.stack([images["height"], images["width"]], axis=1).astype(np.int64)
            num_pixels = self.sizes.prod(axis=1)
            complete = np.array_equal(self._starts, images["data_ptr"]) and (self._ends <= num_bytes).all()
            if not complete or (table["size"] != 3 * num_pixels)[~self.is_jpeg].any():
                raise ValueError("its table of contents does not match its images")
            if np.bincount(labels, minlength=len(self.classes)).tolist() != expected:
                raise ValueError(f"it has other classes, or images of each, than {path.name}.json says")
        except Exception as error:  # of many kinds on bad data
            raise self._unusable(f"{path} is damaged or of another version of FFCV ({error!r})") from error
        self.labels = torch.from_numpy(labels)
        self._max_pixels = int(num_pixels.max(initial=0))
        self._content = np.memmap(path, np.uint8, mode="r").view(np.ndarray)

    def _unusable(self, reason: str) -> UserError:
        return UserError(f"{reason}; write {self.path.name} again with python -m mrl.data.write_ffcv")

    def stored(self, index: int) -> np.ndarray:
        """Return the bytes of an image in the file: pixels, or a JPEG."""
        return self._content[self._starts[index] : self._ends[index]]

    def scratch(self) -> np.ndarray:
        """Return room for the pixels of any image."""
        return np.empty(3 * self._max_pixels, dtype=np.uint8)

    def decode(self, index: int, scratch: np.ndarray) -> np.ndarray:
        """Return an image, ``(H, W, 3)`` uint8, valid until ``scratch`` is used again.

        Raises:
            UserError: Its JPEG cannot be decoded.
        """
        height, width = self.sizes[index].tolist()
        if not self.is_jpeg[index]:
            return self.stored(index).reshape(height, width, 3)
        pixels = scratch[: 3 * height * width].reshape(height, width, 3)
        if self._imdecode(self.stored(index), pixels, height, width, height, width) != 0:
            raise self._unusable(f"image {index} in {self.path} cannot be decoded")
        return pixels


class FFCVImages(Images):
    """A split in an FFCV file, decoded by ``num_threads`` threads, each of which works on a batch."""

    def __init__(self, file: FFCVFile, transform: Transform, device: torch.device, num_threads: int):
        super().__init__(file.labels, file.classes, transform, device)
        self._file, self._num_threads = file, num_threads
        self._resize_crop = import_ffcv().libffcv.resize_crop

    def _content(self) -> bytes:
        return json.dumps([self._file.description, self._file.path.stat().st_mtime_ns]).encode()

    def _load_all(self, load: LoadBatch, indices: Sequence[np.ndarray]) -> Iterator[Tensor]:
        return map_ahead(load, indices, self._num_threads)

    def _empty(self, num_images: int, px: int) -> Tensor:
        return torch.empty(num_images, px, px, 3, dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    def _train_crops(self, indices: np.ndarray, epoch: int, px: int) -> Tensor:
        import cv2  # which FFCV needs

        boxes, flipped = self.transform.train_boxes(epoch, indices, self._file.sizes[indices])
        crops, scratch = self._empty(len(indices), px), self._file.scratch()
        for index, box, mirror, out in zip(indices, boxes.tolist(), flipped, crops.numpy(), strict=True):
            top, left, height, width = box
            self._resize_crop(self._file.decode(index, scratch), top, top + height, left, left + width, out)
            if mirror:
                cv2.flip(out, 1, out)
        return crops.permute(0, 3, 1, 2)

    def _center_crops(self, indices: np.ndarray) -> Tensor:
        how = self.transform.eval_resize_px, self.transform.eval_px, self.transform.interpolation
        crops, scratch = self._empty(len(indices), self.transform.eval_px), self._file.scratch()
        for index, out in zip(indices, crops, strict=True):
            pixels = np.require(self._file.decode(index, scratch), requirements="W")  # as torch wants it
            image = torch.from_numpy(pixels).permute(2, 0, 1)
            out.copy_(resize_and_center_crop(image, *how).permute(1, 2, 0))
        return crops.permute(0, 3, 1, 2)
