"""Which images make up each batch: pure functions of seed, epoch and image number.

Nothing here keeps a state, so a run that was stopped in mid-epoch goes on with the batches it would
have had, and any number of processes sees the same global batches.

timm's RandAugment, made a pure function of the sample.

Random resized crops whose place depends on the sample alone, and their resampling on any device.
"""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import RandAugment, rand_augment_transform
from torch import Tensor
from torchvision.transforms.v2 import functional

from mrl.errors import UserError

# Separate streams of random numbers: were they one, an image's place in the epoch would tell its crop.
ORDER_STREAM, CROP_STREAM, AUGMENT_STREAM = 0, 1, 2


def counter_hash(*keys: int | np.ndarray) -> np.ndarray:
    """64 well-mixed bits (uint64) for every combination of ``keys`` (whole numbers >= 0, broadcast together).

    Splitmix64's output function, applied once per key. Unlike a generator's stream it has no state,
    and unlike numpy's generators it will never change between versions.
    """
    bits = np.zeros(1, dtype=np.uint64)
    for key in keys:
        bits = bits + np.asarray(key, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        bits = bits ^ (bits >> np.uint64(31))
    return bits


def epoch_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """The order of all rows in an epoch, ``(N,)`` int64: a permutation that depends on nothing else."""
    return np.argsort(counter_hash(ORDER_STREAM, seed, epoch, np.arange(num_rows)), kind="stable")


def train_indices(
    num_rows: int,
    batch_size: int,
    seed: int,
    epoch: int,
    rank: int = 0,
    world_size: int = 1,
    accumulation_steps: int = 1,
    start_step: int = 0,
) -> list[np.ndarray]:
    """The rows of each micro-batch that process ``rank`` takes in an epoch, in turn; int64.

    Step s works on the global batch ``order[s * batch_size : (s + 1) * batch_size]``. Each process
    takes a contiguous share of it and cuts that into ``accumulation_steps`` consecutive
    micro-batches. The last, incomplete global batch is left out.

    Args:
        num_rows: Training images.
        batch_size: Images per step, over all processes and micro-batches together.
        seed: Seed of the run.
        epoch: Epoch, counted from 0.
        rank: This process, counted from 0.
        world_size: Number of processes.
        accumulation_steps: Micro-batches per step.
        start_step: Steps of this epoch that are already done.

    Raises:
        UserError: The global batch cannot be cut evenly, or there are fewer images than one batch.
    """
    shares = world_size * accumulation_steps
    if batch_size % shares:
        raise UserError(
            f"data.batch_size is {batch_size}; allowed: a multiple of "
            f"{world_size} processes x {accumulation_steps} accumulation steps = {shares}"
        )
    if num_rows < batch_size:
        raise UserError(f"data.batch_size is {batch_size}; allowed: at most the {num_rows} training images")
    num_steps = num_rows // batch_size
    order = epoch_order(num_rows, seed, epoch)[: num_steps * batch_size]
    own = order.reshape(num_steps, world_size, accumulation_steps, -1)[start_step:, rank]
    return [rows for step in own for rows in step]


def eval_indices(num_rows: int, batch_size: int, rank: int = 0, world_size: int = 1) -> list[np.ndarray]:
    """The rows of each batch that process ``rank`` evaluates, int64, in dataset order.

    The shares of all processes hold every row exactly once, whatever the numbers: some process
    may have one row fewer than another, or none, but none is repeated to even them out.
    """
    first, end = (share * num_rows // world_size for share in (rank, rank + 1))
    return [np.arange(start, min(start + batch_size, end)) for start in range(first, end, batch_size)]


def rand_augment(
    image: Tensor, words: str, mean: tuple[float, float, float], seed: int, epoch: int, row: int
) -> Tensor:
    """``image`` ``(3, px, px)`` uint8 after RandAugment as ``words`` describe it, a function of (seed, epoch, row).

    Args:
        image: A crop.
        words: As `mrl.config.DataConfig.rand_augment`.
        mean: Red, green, blue from 0 to 1 of pixels that come in from outside the image.
        seed: Seed of the run.
        epoch: Epoch, counted from 0.
        row: Image number.
    """
    augment = _augment(words, image.shape[-1], mean)
    with _global_generators(int(counter_hash(AUGMENT_STREAM, seed, epoch, row)[0])):
        augmented = augment(functional.to_pil_image(image))
    return functional.pil_to_tensor(augmented)


@functools.lru_cache
def _augment(words: str, px: int, mean: tuple[float, float, float]) -> RandAugment:
    fill = tuple(round(255 * channel) for channel in mean)
    augment = rand_augment_transform(words, {"translate_const": int(0.45 * px), "img_mean": fill})
    for operation in augment.ops:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize
    return augment


def _posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    """``image`` with the highest ``bits`` of each channel kept; timm goes down to 0, which Pillow refuses."""
    return image.point(lambda value: value & ~(2 ** (8 - bits) - 1) & 255) if bits < 8 else image


@contextlib.contextmanager
def _global_generators(seed: int) -> Iterator[None]:
    """Python's and numpy's global generators, which timm draws from, seeded meanwhile and then as before."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


NUM_TRIES = 10  # as torchvision's RandomResizedCrop


@dataclass(frozen=True)
class Transform:
    """What happens to images between decoding and the model; the fields are those of `mrl.config.DataConfig`."""

    seed: int
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    flip: bool
    eval_resize_px: int
    eval_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rand_augment: str | None = None

    def train_boxes(
        self, epoch: int, rows: np.ndarray, heights: np.ndarray, widths: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The crops of images in an epoch; see `random_resized_crops`."""
        return random_resized_crops(
            self.seed, epoch, rows, heights, widths, self.crop_scale, self.crop_ratio, self.flip
        )

    def augmented(self, crop: Tensor, epoch: int, row: int) -> Tensor:
        """The crop ``(3, px, px)`` uint8 of an image after RandAugment, if that is asked for."""
        if self.rand_augment is None:
            return crop
        return rand_augment(crop, self.rand_augment, self.mean, self.seed, epoch, row)


def sample_uniforms(seed: int, epoch: int, rows: np.ndarray, count: int) -> np.ndarray:
    """Random numbers ``(B, count)`` float64 in [0, 1), a pure function of (seed, epoch, row, column).

    So what happens to a sample does not depend on its batch, worker, process or device.
    """
    bits = counter_hash(CROP_STREAM, seed, epoch, rows[:, None], np.arange(count))
    return (bits >> np.uint64(11)) * 2.0**-53


def random_resized_crops(
    seed: int,
    epoch: int,
    rows: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Crop boxes ``(B, 4)`` int64 (top, left, height, width) and ``(B,)`` bool, whether to mirror.

    Distributed as torchvision's RandomResizedCrop: the first of ten tries that fits, else a centered
    crop of the nearest allowed shape.

    Args:
        seed: Seed of the run.
        epoch: Epoch, counted from 0.
        rows: ``(B,)`` image numbers.
        heights: ``(B,)`` heights of the images in pixels.
        widths: ``(B,)`` widths of the images in pixels.
        scale: Smallest and largest share of the image's area.
        ratio: Smallest and largest width / height, drawn evenly in their logarithm.
        flip: Mirror half of the images; False mirrors none.
    """
    uniforms = sample_uniforms(seed, epoch, rows, 2 * NUM_TRIES + 3)
    u_area, u_ratio = uniforms[:, :NUM_TRIES], uniforms[:, NUM_TRIES : 2 * NUM_TRIES]
    u_top, u_left, u_flip = uniforms[:, 2 * NUM_TRIES :].T
    heights, widths = np.asarray(heights, dtype=np.int64), np.asarray(widths, dtype=np.int64)

    areas = (heights * widths)[:, None] * (scale[0] + (scale[1] - scale[0]) * u_area)
    low, high = np.log(ratio)
    ratios = np.exp(low + (high - low) * u_ratio)
    tried_widths = np.rint(np.sqrt(areas * ratios)).astype(np.int64)
    tried_heights = np.rint(np.sqrt(areas / ratios)).astype(np.int64)
    fits = (tried_widths > 0) & (tried_widths <= widths[:, None])
    fits &= (tried_heights > 0) & (tried_heights <= heights[:, None])
    first = np.arange(len(rows)), fits.argmax(axis=1)
    fitted = fits[first]

    # Where nothing fits: the whole image, its longer side cut to the nearest allowed ratio.
    whole_heights = np.minimum(heights, np.rint(widths / ratio[0]).astype(np.int64))
    whole_widths = np.minimum(widths, np.rint(heights * ratio[1]).astype(np.int64))
    box_heights = np.where(fitted, tried_heights[first], whole_heights)
    box_widths = np.where(fitted, tried_widths[first], whole_widths)
    free_rows, free_columns = heights - box_heights, widths - box_widths
    tops = np.where(fitted, (u_top * (free_rows + 1)).astype(np.int64), free_rows // 2)
    lefts = np.where(fitted, (u_left * (free_columns + 1)).astype(np.int64), free_columns // 2)
    return np.stack([tops, lefts, box_heights, box_widths], axis=1), flip & (u_flip < 0.5)


def crop_and_resize(images: Tensor, boxes: np.ndarray, flipped: np.ndarray, out_px: int) -> Tensor:
    """Crops of float images, resized: ``(B, 3, H, W) -> (B, 3, out_px, out_px)``, on the images' device.

    Antialiased bilinear, as torchvision's ``resized_crop(antialias=True)`` on float input. The
    resampling is separable and linear, so it is one batched matrix product per axis: each sample's
    matrix holds its crop, its scale and its flip.

    Args:
        images: Pixels on any scale.
        boxes: ``(B, 4)`` top, left, height, width in pixels, inside the images.
        flipped: ``(B,)`` bool, mirror this crop left to right.
        out_px: Side of the result in pixels.
    """
    num_images, channels, height, width = images.shape
    # Copies to a GPU do not wait: the host would stand still until the GPU has caught up.
    windows = torch.as_tensor(boxes).to(images.device, non_blocking=True)
    row_weights = _resampling_matrices(windows[:, 0], windows[:, 2], height, out_px).to(images.dtype)
    column_weights = _resampling_matrices(windows[:, 1], windows[:, 3], width, out_px).to(images.dtype)
    mirror = torch.as_tensor(flipped).to(images.device, non_blocking=True)[:, None, None]
    column_weights = torch.where(mirror, column_weights.flip(1), column_weights)
    # Rows before channels: then both products are plain batched ones (twice as fast on a CPU as a broadcast).
    rows_first = images.transpose(1, 2).reshape(num_images, height, channels * width)
    shortened = (row_weights @ rows_first).view(num_images, out_px * channels, width)
    resized = shortened @ column_weights.transpose(1, 2)
    return resized.view(num_images, out_px, channels, out_px).transpose(1, 2)


def _resampling_matrices(starts: Tensor, lengths: Tensor, size: int, out_px: int) -> Tensor:
    """Weights ``(B, out_px, size)`` that resample the window ``starts .. starts + lengths`` of an axis."""
    lengths, starts = lengths.float()[:, None, None], starts[:, None, None]
    scale = lengths / out_px  # source pixels per output pixel
    centers = (torch.arange(out_px, device=starts.device)[:, None] + 0.5) * scale  # (B, out_px, 1)
    places = torch.arange(size, device=starts.device) - starts + 0.5  # (B, 1, size)
    weights = (1 - (places - centers).abs() / scale.clamp(min=1)).clamp_(min=0)
    weights *= (places > 0) & (places < lengths)
    return weights / weights.sum(dim=-1, keepdim=True)


def resize_and_center_crop(image: Tensor, resize_px: int, crop_px: int) -> Tensor:
    """One image ``(3, H, W)``, its shorter side resized to ``resize_px``, then cut to the center ``crop_px`` square."""
    return functional.center_crop(functional.resize(image, [resize_px], antialias=True), [crop_px, crop_px])


def normalize(images: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Tensor:
    """Images ``(B, 3, H, W)`` of pixels from 0 to 255 (uint8 or float), as float32, normalized, channels_last."""
    width = images.shape[-1]
    out = torch.empty(images.shape, device=images.device, memory_format=torch.channels_last).copy_(images)
    # On whole rows of pixels, because arithmetic along an innermost axis of three channels is several times slower.
    rows = out.permute(0, 2, 3, 1).view(-1, width * 3)
    rows -= _per_row(mean, width, images.device)
    rows /= _per_row(std, width, images.device)
    return out


@functools.lru_cache
def _per_row(values: tuple[float, float, float], width: int, device: torch.device) -> Tensor:
    """Values per channel for a row of ``width`` pixels, ``(3 * width,)`` on the scale 0 to 255."""
    return 255 * torch.tensor(values).repeat(width).to(device)
