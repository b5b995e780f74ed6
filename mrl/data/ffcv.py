"""Images in FFCV files (.beton), decoded in threads by FFCV's library.

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

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from mrl.data.beton import Beton, import_ffcv
from mrl.data.crops import Transform, normalise, resize_and_centre_crop

BATCHES_AHEAD = 3
IMAGES_PER_TASK = 16


class FFCVImages:
    """A split in an FFCV file; for sets of any size.

    Args:
        beton: The file.
        transform: Crops and normalisation.
        device: Where batches are wanted.
        pool: Threads that decode.
    """

    def __init__(self, beton: Beton, transform: Transform, device: torch.device, pool: ThreadPoolExecutor):
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
        """Centre crops for each array of rows; ``flip`` mirrors every one.

        Raises:
            UserError: An image cannot be decoded.
        """

        def places(batch_rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return np.empty((len(batch_rows), 0), np.int64), np.full(len(batch_rows), flip)

        return self._batches(rows, self._transform.eval_px, places, self._centre)

    def _crop(self, pixels: np.ndarray, box: np.ndarray, into: np.ndarray) -> None:
        top, left, height, width = box.tolist()
        self._resize_crop(pixels, top, top + height, left, left + width, into)

    def _centre(self, pixels: np.ndarray, box: np.ndarray, into: np.ndarray) -> None:
        writable = np.require(pixels, requirements="W")  # torch warns of what it cannot write to
        image = torch.from_numpy(writable).permute(2, 0, 1)
        centre = resize_and_centre_crop(image, self._transform.eval_resize_px, self._transform.eval_px)
        into[:] = centre.permute(1, 2, 0).numpy()

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
                yield normalise(on_device, self._transform.mean, self._transform.std), labels
        finally:  # the last batch is out, an image could not be decoded, or nobody wants the rest
            for *_, tasks in started:
                for task in tasks:
                    task.cancel()
