"""Order, crops and RandAugment depend on (seed, epoch, sample) alone; resampling is torchvision's."""

import dataclasses
import random

import numpy as np
import pytest
import torch
from timm.data.auto_augment import rand_augment_transform
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from mrl.config import DataConfig
from mrl.data.transforms import (
    Transform,
    crop_and_resize,
    eval_indices,
    normalize,
    resize_and_center_crop,
    train_indices,
)
from mrl.errors import UserError

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def transform(seed=0, scale=SCALE, ratio=RATIO, flip=True, rand_augment=None):
    return Transform(seed, scale, ratio, flip, 48, 40, MEAN, STD, rand_augment)


def boxes_of(num_images, height, width, epoch=0, **settings):
    return transform(**settings).train_boxes(epoch, np.arange(num_images), np.array([[height, width]] * num_images))


def order(num_images, seed, epoch):
    return train_indices(num_images, num_images, seed, epoch)[0]


@pytest.mark.parametrize("num_images", [1, 2, 1000])
def test_the_order_of_an_epoch_is_a_permutation(num_images):
    found = order(num_images, seed=1, epoch=2)
    assert found.dtype == np.int64 and sorted(found) == list(range(num_images))


def test_the_order_depends_on_seed_and_epoch_only():
    expected = order(1000, 1, 2)
    np.random.default_rng().random(10)
    assert np.array_equal(expected, order(1000, 1, 2))
    for seed, epoch in ((1, 3), (2, 2), (2, 1)):
        assert (expected == order(1000, seed, epoch)).sum() < 10  # unrelated permutations agree in 1 place on average


@pytest.mark.parametrize(("world_size", "accumulation_steps"), [(1, 1), (2, 3), (4, 2)])
def test_all_processes_together_take_the_same_global_batches(world_size, accumulation_steps):
    shares = [train_indices(100, 24, 7, 1, rank, world_size, accumulation_steps) for rank in range(world_size)]
    assert {len(share) for share in shares} == {4 * accumulation_steps}
    for step in range(4):
        micro_batches = slice(step * accumulation_steps, (step + 1) * accumulation_steps)
        together = np.concatenate([batch for share in shares for batch in share[micro_batches]])
        assert together.tolist() == order(100, 7, 1)[step * 24 : (step + 1) * 24].tolist()


@pytest.mark.parametrize("start_step", [1, 4])
def test_starting_in_mid_epoch_gives_the_tail(start_step):
    whole = train_indices(100, 24, 7, 1, rank=1, world_size=2, accumulation_steps=3)
    tail = train_indices(100, 24, 7, 1, rank=1, world_size=2, accumulation_steps=3, start_step=start_step)
    assert len(tail) == len(whole) - 3 * start_step
    assert all(np.array_equal(a, b) for a, b in zip(tail, whole[3 * start_step :], strict=True))


@pytest.mark.parametrize(
    ("num_images", "batch_size", "message"),
    [
        (1000, 100, r"data.batch_size is 100; .* 3 processes x 2 accumulation steps = 6$"),
        (65, 66, r"data.batch_size is 66; allowed: at most the 65 training images"),
    ],
)
def test_an_impossible_batch_size_is_refused(num_images, batch_size, message):
    with pytest.raises(UserError, match=message):
        train_indices(num_images, batch_size, 0, 0, world_size=3, accumulation_steps=2)


@pytest.mark.parametrize("num_images", [1, 7, 101])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 5, 200])
def test_evaluation_counts_every_image_once_for_any_world_size(num_images, world_size, batch_size):
    shares = [eval_indices(num_images, batch_size, rank, world_size) for rank in range(world_size)]
    batches = [batch for share in shares for batch in share]
    assert np.concatenate(batches).tolist() == list(range(num_images))
    assert all(0 < len(batch) <= batch_size and batch.dtype == np.int64 for batch in batches)
    sizes = [sum(map(len, share)) for share in shares]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("height", "width"), [(375, 500), (64, 64), (40, 400), (400, 40), (3, 2)])
def test_crops_are_distributed_as_torchvisions(height, width):
    num_draws = 4000
    boxes, _ = boxes_of(num_draws, height, width)
    random_crop, image = v2.RandomResizedCrop(8, SCALE, RATIO), torch.empty(3, height, width)
    drawn = [random_crop.make_params([image]) for _ in range(num_draws)]
    expected = np.array([[draw[key] for key in ("top", "left", "height", "width")] for draw in drawn])
    assert boxes.dtype == np.int64 and (boxes[:, :2] >= 0).all() and (boxes[:, 2:] > 0).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= [height, width]).all()
    for ours, theirs in zip(np.sort(boxes.T), np.sort(expected.T), strict=True):
        # Kolmogorov-Smirnov distance of two samples of 4000: 99.9 % below 1.95 * sqrt(2 / 4000) = 0.044.
        values = np.union1d(ours, theirs)
        shares = [np.searchsorted(sample, values, side="right") / num_draws for sample in (ours, theirs)]
        assert abs(shares[0] - shares[1]).max() < 0.044


@pytest.mark.parametrize(
    ("height", "width", "ratio", "box"),
    [
        (10, 100, RATIO, [0, 43, 10, 13]),  # too wide: 10 x 4/3 wide, centered
        (100, 10, RATIO, [43, 0, 13, 10]),  # too tall
        (30, 30, (1.3, 4 / 3), [3, 0, 23, 30]),  # square where only wide ones are allowed: 30 / 1.3 tall
    ],
)
def test_if_no_try_fits_the_center_is_taken(height, width, ratio, box):
    boxes, _ = boxes_of(50, height, width, scale=(0.9, 1.0), ratio=ratio)
    expected = v2.RandomResizedCrop(8, (0.9, 1.0), ratio).make_params([torch.empty(3, height, width)])
    assert [expected[key] for key in ("top", "left", "height", "width")] == box
    assert (boxes == box).all()


def test_half_of_the_images_are_mirrored_or_none():
    assert abs(boxes_of(10_000, 64, 64)[1].mean() - 0.5) < 0.02
    assert not boxes_of(1000, 64, 64, flip=False)[1].any()


@pytest.mark.parametrize(("height", "width", "out_px"), [(64, 64, 64), (64, 64, 24), (50, 90, 112), (33, 47, 1)])
def test_resampling_agrees_with_torchvision(height, width, out_px):
    images = torch.rand(24, 3, height, width)
    boxes, flipped = boxes_of(24, height, width)
    assert flipped.any() and not flipped.all()
    ours = crop_and_resize(images, boxes, flipped, out_px)
    for image, box, mirror, out in zip(images, boxes.tolist(), flipped, ours, strict=True):
        expected = functional.resized_crop(image, *box, size=[out_px, out_px], antialias=True)
        expected = functional.horizontal_flip(expected) if mirror else expected
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


@pytest.mark.gpu
def test_a_gpu_cuts_the_same_crops_to_within_half_a_gray_level():
    images = torch.rand(24, 3, 64, 64) * 255
    boxes, flipped = boxes_of(24, 64, 64)
    expected = crop_and_resize(images, boxes, flipped, 48)
    torch.testing.assert_close(crop_and_resize(images.cuda(), boxes, flipped, 48).cpu(), expected, atol=0.5, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(48, 48), (60, 100), (101, 60), (20, 33)])
def test_evaluation_crops_as_torchvisions_resize_and_center_crop(height, width):
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    expected = v2.Compose([v2.Resize(48, antialias=True), v2.CenterCrop(40)])(image)
    assert torch.equal(resize_and_center_crop(image, 48, 40), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_normalized_images_are_float32_channels_last(dtype):
    images = torch.randint(0, 256, (4, 3, 8, 9), dtype=torch.uint8)
    out = normalize(images.to(dtype), MEAN, STD)
    assert out.dtype == torch.float32 and out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, functional.normalize(images / 255, list(MEAN), list(STD)))


@pytest.fixture
def image():
    return torch.randint(256, (3, 40, 40), dtype=torch.uint8)


def test_rand_augment_is_timms_with_generators_seeded_by_the_sample(image):
    description = "rand-m9-n2-mstd0.5-inc1"
    ours = transform(5, rand_augment=description)
    augment, expected = rand_augment_transform(description, {"translate_const": 18, "img_mean": (102, 128, 153)}), []
    for index in range(20):
        seed = int(ours._uniforms(3, np.array([index]))[0, -1] * 2**32)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        expected.append(functional.pil_to_tensor(augment(functional.to_pil_image(image))))
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    found = [ours.augment(image, 3, index) for index in range(20)]
    assert torch.equal(torch.stack(found), torch.stack(expected))
    assert len({tuple(one.flatten().tolist()) for one in found}) > 10
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[:2]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])
    assert torch.equal(dataclasses.replace(ours, rand_augment=None).augment(image, 3, 0), image)


@pytest.mark.parametrize("kind", ["", "-inc1", "-tweights", "-t3a", "-t3aw"])
@pytest.mark.parametrize("strength", ["-m0", "-m10", "-m9-mstd2", "-m9-mmax20-mstd101"])
def test_every_operation_works_at_every_strength(image, kind, strength):
    """Pillow refuses to posterize to no bits, which timm asks for at magnitude 10 (fault of timm 1.0.31, Pillow 13)."""
    config = DataConfig(rand_augment=f"rand-n9-p1{strength}{kind}")
    for index in range(5):
        assert transform(rand_augment=config.rand_augment).augment(image, 0, index).shape == image.shape
