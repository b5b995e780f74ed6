"""FFCV files (.beton) with a description beside them: opened, checked, read image by image.

Images in FFCV files (.beton), decoded in threads by FFCV's library.

FFCV's are the file format, its JPEG decoding (libturbojpeg) and the resampling of training crops (OpenCV's area
interpolation, with which the paper trained). Which images make up a batch and where they are cropped is
ours, as in the other backends. FFCV's own Loader could not promise that: it repeats validation images where
the processes do not divide them, begins a resumed run with the order of epoch 0, draws crops from the generators
of its threads, and hands out whatever the memory held where an image cannot be decoded.

Training crops are the same part of an image as in the folder backend as long as the file holds the image in its full
size; where the writer has shrunk it, the box is drawn on the smaller image. Evaluation resizes exactly as the
folder backend does: pixels are equal where the file holds the image raw and in its full size.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mrl.data.transforms import Transform, normalize, resize_and_center_crop
from mrl.errors import UserError

INSTALL = (
    "apt-get install build-essential pkg-config libopencv-dev libturbojpeg0-dev, then "
    "pip install -r requirements-ffcv.txt"
)


def import_ffcv() -> Any:
    """The module ``ffcv``; importing it leaves torch's number of threads as it was.

    Raises:
        UserError: It is not installed, or its libraries are missing.
    """
    num_threads = torch.get_num_threads()
    try:
        import ffcv.libffcv
        import ffcv.reader
        import ffcv.types
    except (ImportError, OSError) as error:
        raise UserError(
            f"FFCV cannot be imported ({error}); install it ({INSTALL}) or use data.backend folder"
        ) from error
    finally:
        torch.set_num_threads(num_threads)  # FFCV sets it to 1
    return ffcv


@dataclass(frozen=True)
class Description:
    """What stands beside a .beton, in <name>.beton.json: what FFCV's format has no room for, and what to check.

    Attributes:
        split: Name of the split.
        classes: Names of the classes; labels are positions in it.
        counts: Images of each class.
        num_bytes: Size of the file.
        settings: How the images were written, by the names of the writer's options.
    """

    split: str
    classes: list[str]
    counts: list[int]
    num_bytes: int
    settings: dict[str, float]

    def to_json(self) -> str:
        """As text of a file."""
        return json.dumps(asdict(self)) + "\n"


def read_description(beton: Path) -> Description:
    """What stands beside ``beton``.

    Raises:
        UserError: Nothing does, or it cannot be understood.
    """
    path = Path(f"{beton}.json")
    try:
        return Description(**json.loads(path.read_text()))
    except FileNotFoundError:
        raise UserError(f"{path} is missing, which names the classes of {beton.name}; {_write_anew(beton)}") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); {_write_anew(beton)}") from error


def _write_anew(beton: Path) -> str:
    return f"write {beton.name} anew with python -m mrl.data.write_ffcv"


class FFCVFile:
    """An FFCV file of images and labels, checked to be whole and to hold what is said of it.

    Args:
        path: The file.
        description: What it should hold.

    Attributes:
        classes: Names of the classes.
        labels: ``(N,)`` int64, positions in ``classes``.
        heights: ``(N,)`` int64, of the images as they are stored, in pixels.
        widths: ``(N,)`` int64, likewise.
        is_jpeg: ``(N,)`` bool; False where raw pixels are stored.
        starts: ``(N,)`` int64, where each image begins in the file, in bytes.
        sizes: ``(N,)`` int64, its length there, in bytes.

    Raises:
        UserError: FFCV is not installed, or the file cannot be read, is cut short, of another version of
            the format, or holds something else.
    """

    def __init__(self, path: Path, description: Description):
        ffcv = import_ffcv()
        self.path = path
        self.classes = description.classes
        self._imdecode = ffcv.libffcv.imdecode
        try:
            num_bytes = path.stat().st_size
            header = np.fromfile(path, ffcv.types.HeaderType, count=1)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); {_write_anew(path)}") from error
        if len(header) and header["version"][0] != ffcv.types.CURRENT_VERSION:
            raise UserError(
                f"{path} is no FFCV file of version {ffcv.types.CURRENT_VERSION}, which the installed FFCV reads "
                f"(its header says {header['version'][0]}); {_write_anew(path)}"
            )
        if num_bytes != description.num_bytes or not len(header):
            raise UserError(
                f"{path} has {num_bytes:,} bytes, not the {description.num_bytes:,} that {path.name}.json says: "
                f"it is cut short or another file; {_write_anew(path)}"
            )
        try:
            reader = ffcv.reader.Reader(str(path))
        except Exception as error:  # of many kinds on bad data
            raise UserError(f"{path} is damaged ({error!r}); {_write_anew(path)}") from error
        held = [(name, type(field).__name__) for name, field in reader.handlers.items()]
        if held != [("image", "RGBImageField"), ("label", "IntField")]:
            raise UserError(f"{path} holds {held}, not an image and a label; {_write_anew(path)}")
        images, labels = reader.metadata["f0"], reader.metadata["f1"].astype(np.int64)
        counts = np.bincount(labels[labels >= 0], minlength=len(self.classes)).tolist()
        if counts != description.counts or (labels < 0).any():
            raise UserError(
                f"{path} does not hold the classes that {path.name}.json says, or not as many images of each "
                f"({len(labels):,} images in all, expected {sum(description.counts):,}); {_write_anew(path)}"
            )
        table = reader.alloc_table[np.argsort(reader.alloc_table["sample_id"])]
        is_jpeg = images["mode"] == 0
        num_pixels = images["height"].astype(np.int64) * images["width"]
        fits = np.array_equal(table["ptr"], images["data_ptr"]) and (table["ptr"] + table["size"] <= num_bytes).all()
        if not fits or (~is_jpeg & (table["size"] != 3 * num_pixels)).any():
            raise UserError(f"{path} is damaged: its table of contents does not fit its images; {_write_anew(path)}")
        self.labels = torch.from_numpy(labels)
        self.starts, self.sizes = table["ptr"].astype(np.int64), table["size"].astype(np.int64)
        self.heights, self.widths = images["height"].astype(np.int64), images["width"].astype(np.int64)
        self.is_jpeg = is_jpeg
        self._max_pixels = int(num_pixels.max(initial=0))
        self._content = np.memmap(path, np.uint8, mode="r").view(np.ndarray)

    def stored(self, row: int) -> np.ndarray:
        """The bytes of an image as they stand in the file: pixels, or a JPEG."""
        start = self.starts[row]
        return self._content[start : start + self.sizes[row]]

    def scratch(self) -> np.ndarray:
        """Room for the pixels of any image; uint8."""
        return np.empty(3 * self._max_pixels, dtype=np.uint8)

    def decode(self, row: int, scratch: np.ndarray) -> np.ndarray:
        """An image, ``(H, W, 3)`` uint8, to be read before ``scratch`` is used again.

        Raises:
            UserError: Its JPEG cannot be decoded.
        """
        height, width = int(self.heights[row]), int(self.widths[row])
        if not self.is_jpeg[row]:
            return self.stored(row).reshape(height, width, 3)
        pixels = scratch[: 3 * height * width].reshape(height, width, 3)
        if self._imdecode(self.stored(row), pixels, height, width, height, width) != 0:
            raise UserError(f"image {row} in {self.path} cannot be decoded; {_write_anew(self.path)}")
        return pixels


BATCHES_AHEAD = 3
IMAGES_PER_TASK = 16


class FFCVImages:
    """A split in an FFCV file; for sets of any size.

    Args:
        beton: The file.
        transform: Crops and normalization.
        device: Where batches are wanted.
        pool: Threads that decode.
    """

    def __init__(self, beton: FFCVFile, transform: Transform, device: torch.device, pool: ThreadPoolExecutor):
        self.labels = beton.labels
        self.classes = list(beton.classes)
        self._beton = beton
        self._transform = transform
        self._device = device
        self._pool = pool
        self._resize_crop = import_ffcv().libffcv.resize_crop
        import cv2  # which FFCV needs

        self._cv2 = cv2

    def __len__(self) -> int:
        return len(self.labels)

    def train_batches(self, rows: Sequence[np.ndarray], epoch: int, px: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Random crops of side ``px`` for each array of rows.

        Raises:
            UserError: An image cannot be decoded.
        """

        def places(batch_rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            heights, widths = self._beton.heights[batch_rows], self._beton.widths[batch_rows]
            return self._transform.train_boxes(epoch, batch_rows, heights, widths)

        return self._batches(rows, px, places, self._crop)

    def eval_batches(self, rows: Sequence[np.ndarray], flip: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Center crops for each array of rows; ``flip`` mirrors every one.

        Raises:
            UserError: An image cannot be decoded.
        """

        def places(batch_rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return np.empty((len(batch_rows), 0), np.int64), np.full(len(batch_rows), flip)

        return self._batches(rows, self._transform.eval_px, places, self._center)

    def _crop(self, pixels: np.ndarray, box: np.ndarray, into: np.ndarray) -> None:
        top, left, height, width = box.tolist()
        self._resize_crop(pixels, top, top + height, left, left + width, into)

    def _center(self, pixels: np.ndarray, box: np.ndarray, into: np.ndarray) -> None:
        writable = np.require(pixels, requirements="W")  # torch warns of what it cannot write to
        image = torch.from_numpy(writable).permute(2, 0, 1)
        center = resize_and_center_crop(image, self._transform.eval_resize_px, self._transform.eval_px)
        into[:] = center.permute(1, 2, 0).numpy()

    def _batches(
        self,
        rows: Sequence[np.ndarray],
        side: int,
        places: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
        cut: Callable[[np.ndarray, np.ndarray, np.ndarray], None],
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches in turn, while the threads work on the next ones.

        Args:
            rows: Rows of each batch.
            side: Side of the images in pixels.
            places: Boxes ``(B, 4)`` or ``(B, 0)`` and ``(B,)`` bool, whether to mirror, for the rows of a batch.
            cut: Puts an image ``(H, W, 3)`` uint8, cut to its box, into one of ``(side, side, 3)``.
        """

        def load(rows: np.ndarray, boxes: np.ndarray, flipped: np.ndarray, into: np.ndarray) -> None:
            scratch = self._beton.scratch()
            for row, box, mirror, image in zip(rows.tolist(), boxes, flipped, into, strict=True):
                cut(self._beton.decode(row, scratch), box, image)
                if mirror:
                    self._cv2.flip(image, 1, image)

        waiting = deque(map(np.asarray, rows))
        started: deque[tuple[np.ndarray, Tensor, list[Future[None]]]] = deque()
        try:
            while waiting or started:
                while waiting and len(started) <= BATCHES_AHEAD:
                    batch_rows = waiting.popleft()
                    shape = len(batch_rows), side, side, 3
                    images = torch.empty(shape, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
                    whole = batch_rows, *places(batch_rows), images.numpy()
                    starts = range(0, len(batch_rows), IMAGES_PER_TASK)
                    parts = [[array[start : start + IMAGES_PER_TASK] for array in whole] for start in starts]
                    started.append((batch_rows, images, [self._pool.submit(load, *part) for part in parts]))
                batch_rows, images, tasks = started[0]
                for task in tasks:
                    task.result()
                started.popleft()
                on_device = images.to(self._device, non_blocking=True).permute(0, 3, 1, 2)
                labels = self.labels[torch.from_numpy(batch_rows)].to(self._device, non_blocking=True)
                yield normalize(on_device, self._transform.mean, self._transform.std), labels
        finally:  # the last batch is out, an image could not be decoded, or nobody wants the rest
            for *_, tasks in started:
                for task in tasks:
                    task.cancel()
