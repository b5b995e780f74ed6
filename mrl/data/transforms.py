"""Which images make up a batch and how they are cropped: pure functions of (seed, epoch, sample).

They keep no state, so a run that resumes in mid-epoch continues with the batches it would have had, and the global
batches are the same for any number of processes.
"""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import RandAugment, rand_augment_transform
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode, functional

from mrl.errors import UserError

NUM_TRIES = 10  # as torchvision's RandomResizedCrop
DRAWS = 2 * NUM_TRIES + 4  # random numbers per sample, a multiple of the 4 that Philox draws at a time


def train_indices(
    num_images: int,
    batch_size: int,
    seed: int,
    epoch: int,
    rank: int = 0,
    world_size: int = 1,
    accumulation_steps: int = 1,
    start_step: int = 0,
) -> list[np.ndarray]:
    """Return the int64 indices of each micro-batch of process ``rank`` in an epoch, from ``start_step`` on.

    Step s takes the global batch ``order[s * batch_size : (s + 1) * batch_size]``. Each process takes a contiguous
    share of it and splits that into ``accumulation_steps`` micro-batches. The last, incomplete batch is dropped.
    """
    shares = world_size * accumulation_steps
    if batch_size % shares:
        raise UserError(
            f"data.batch_size is {batch_size}; allowed: a multiple of "
            f"{world_size} processes x {accumulation_steps} accumulation steps = {shares}"
        )
    if num_images < batch_size:
        raise UserError(f"data.batch_size is {batch_size}; allowed: at most the {num_images} training images")
    num_steps = num_images // batch_size
    order = np.random.default_rng((seed, epoch)).permutation(num_images)[: num_steps * batch_size]
    own = order.reshape(num_steps, world_size, accumulation_steps, -1)[start_step:, rank]
    return [batch for step in own for batch in step]


def cut_batch(batch_size: int, num_images: int, min_steps: int, world_size: int, accumulation_steps: int) -> int:
    """Return the largest batch size up to ``batch_size`` with ``min_steps`` steps an epoch that splits evenly.

    >>> [cut_batch(64, num_images, 10, world_size=2, accumulation_steps=1) for num_images in (1000, 333, 5)]
    [64, 32, 2]
    """
    shares = world_size * accumulation_steps
    most = max(shares, num_images // min_steps // shares * shares)
    return min(batch_size, most)


def eval_indices(num_images: int, batch_size: int, rank: int = 0, world_size: int = 1) -> list[np.ndarray]:
    """Return the int64 indices of each batch that process ``rank`` evaluates, in dataset order.

    Together the processes evaluate every image exactly once; the share of one may be smaller by one image.
    """
    first, end = (share * num_images // world_size for share in (rank, rank + 1))
    return [np.arange(start, min(start + batch_size, end)) for start in range(first, end, batch_size)]


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
    exif_rotation: str = "apply"
    interpolation: str = "bilinear"

    def _uniforms(self, epoch: int, indices: np.ndarray) -> np.ndarray:
        """Return ``(B, DRAWS)`` numbers in [0, 1); sample i gets the i-th ``DRAWS`` of the stream of (seed, epoch)."""
        philox = np.random.Philox(key=[self.seed, epoch])
        generator = np.random.Generator(philox)
        uniforms, position = np.empty((len(indices), DRAWS)), 0
        for index, out in zip(indices.tolist(), uniforms, strict=True):
            philox.advance((index - position) * DRAWS // 4)
            generator.random(out=out)
            position = index + 1
        return uniforms

    def train_boxes(self, epoch: int, indices: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return random crops of images of ``sizes`` ``(B, 2)`` (height, width), all in pixels.

        Distributed as torchvision's RandomResizedCrop, whose own routine takes 10 times as long: the first of ten
        tries that fits, else the center, cut to the nearest allowed ratio.

        Returns:
            Boxes ``(B, 4)`` int64 (top, left, height, width), and ``(B,)`` bool, whether to mirror.
        """
        u_area, u_ratio, u_rest = np.split(self._uniforms(epoch, indices), [NUM_TRIES, 2 * NUM_TRIES], axis=1)
        (smallest, largest), (low, high) = self.crop_scale, self.crop_ratio
        areas = sizes.prod(axis=1, keepdims=True) * (smallest + (largest - smallest) * u_area)  # (B, 10)
        ratios = low * (high / low) ** u_ratio
        tries = np.rint(np.sqrt(np.stack([areas / ratios, areas * ratios], axis=2)))  # (B, 10, 2)
        fits = ((tries > 0) & (tries <= sizes[:, None])).all(axis=2)
        any_fits = fits.any(axis=1, keepdims=True)
        first = tries[np.arange(len(indices)), fits.argmax(axis=1)]
        whole = np.minimum(sizes, np.rint(sizes[:, ::-1] * [1 / low, high]))
        boxes = np.where(any_fits, first, whole).astype(np.int64)
        free = sizes - boxes
        corners = np.where(any_fits, u_rest[:, :2] * (free + 1), free // 2).astype(np.int64)
        return np.concatenate([corners, boxes], axis=1), self.flip & (u_rest[:, 2] < 0.5)

    def augment(self, crop: Tensor, epoch: int, index: int) -> Tensor:
        """Return a crop ``(3, px, px)`` uint8 after timm's RandAugment, if configured."""
        if self.rand_augment is None:
            return crop
        seed = int(self._uniforms(epoch, np.array([index]))[0, -1] * 2**32)
        augment = _rand_augment(self.rand_augment, crop.shape[-1], self.mean)
        # timm uses the global generators of Python and numpy.
        python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
        try:
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            return functional.pil_to_tensor(augment(functional.to_pil_image(crop)))
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


@functools.lru_cache
def _rand_augment(description: str, px: int, mean: tuple[float, float, float]) -> RandAugment:
    fill = tuple(round(255 * channel) for channel in mean)
    augment = rand_augment_transform(description, {"translate_const": int(0.45 * px), "img_mean": fill})
    for operation in augment.ops:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize
    return augment


def _posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    """Keep the highest ``bits`` of each channel; timm goes down to 0, which Pillow refuses."""
    return image.point(lambda value: value & ~(2 ** (8 - bits) - 1) & 255) if bits < 8 else image


def crop_and_resize(images: Tensor, boxes: np.ndarray, flipped: np.ndarray, out_px: int) -> Tensor:
    """Crop, resize and mirror a batch on its device: ``(B, 3, H, W) -> (B, 3, out_px, out_px)``, both float.

    ``boxes`` and ``flipped`` are those of `Transform.train_boxes`. Same result as torchvision's ``resized_crop`` image
    by image: antialiased bilinear resampling is separable and linear, so it is one batched matrix product per axis;
    each sample's matrix holds its crop and flip.
    """
    num_images, channels, height, width = images.shape
    windows = torch.from_numpy(boxes).to(images.device, non_blocking=True)
    mirror = torch.from_numpy(flipped).to(images.device, non_blocking=True)[:, None, None]
    row_weights = _resampling_matrices(windows[:, 0], windows[:, 2], height, out_px)
    column_weights = _resampling_matrices(windows[:, 1], windows[:, 3], width, out_px)
    column_weights = torch.where(mirror, column_weights.flip(1), column_weights)
    # Rows before channels, so that both products are plain batched ones: twice as fast on a CPU as a broadcast.
    rows_first = images.transpose(1, 2).reshape(num_images, height, channels * width)
    shortened = (row_weights @ rows_first).view(num_images, out_px * channels, width)
    resized = shortened @ column_weights.transpose(1, 2)
    return resized.view(num_images, out_px, channels, out_px).transpose(1, 2)


def _resampling_matrices(starts: Tensor, lengths: Tensor, size: int, out_px: int) -> Tensor:
    """Return weights ``(B, out_px, size)`` that resample the window ``starts .. starts + lengths`` of an axis."""
    lengths, starts = lengths.float()[:, None, None], starts[:, None, None]
    scale = lengths / out_px  # source pixels per output pixel
    centers = (torch.arange(out_px, device=starts.device)[:, None] + 0.5) * scale  # (B, out_px, 1)
    places = torch.arange(size, device=starts.device) - starts + 0.5  # (B, 1, size)
    weights = (1 - (places - centers).abs() / scale.clamp(min=1)).clamp_(min=0)
    weights *= (places > 0) & (places < lengths)
    return weights / weights.sum(dim=-1, keepdim=True)


def resize_and_center_crop(image: Tensor, resize_px: int, crop_px: int, interpolation: str = "bilinear") -> Tensor:
    """Resize the shorter side of an image ``(3, H, W)`` to ``resize_px`` and cut out the center ``crop_px`` square."""
    how = InterpolationMode(interpolation)
    return functional.center_crop(functional.resize(image, [resize_px], how, antialias=True), [crop_px, crop_px])


def normalize(images: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Tensor:
    """Return images ``(B, 3, H, W)`` of pixels from 0 to 255 (uint8 or float) as float32, normalized, channels_last."""
    width = images.shape[-1]
    out = torch.empty(images.shape, device=images.device, memory_format=torch.channels_last).copy_(images)
    # On rows of pixels, because arithmetic along an innermost axis of three channels is several times slower.
    rows = out.permute(0, 2, 3, 1).view(-1, width * 3)
    rows -= _per_row(mean, width, images.device)
    rows /= _per_row(std, width, images.device)
    return out


@functools.lru_cache
def _per_row(values: tuple[float, float, float], width: int, device: torch.device) -> Tensor:
    """Repeat the values of the channels for a row of ``width`` pixels, on the scale 0 to 255: ``(3 * width,)``."""
    return 255 * torch.tensor(values).repeat(width).to(device)
