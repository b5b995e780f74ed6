import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from mrl.data.transforms import (
    crop_and_resize,
    normalize,
    random_resized_crops,
    resize_and_center_crop,
    sample_uniforms,
)

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def boxes_of(num_rows, height, width, scale=SCALE, ratio=RATIO, flip=True, seed=0, epoch=0):
    sides = np.full(num_rows, height), np.full(num_rows, width)
    return random_resized_crops(seed, epoch, np.arange(num_rows), *sides, scale, ratio, flip)


def test_uniforms_are_even_and_independent():
    uniforms = sample_uniforms(0, 0, np.arange(20_000), 4)
    assert uniforms.min() >= 0 and uniforms.max() < 1
    # Standard errors here: 0.002 for a mean, 0.007 for a correlation.
    assert abs(uniforms.mean(axis=0) - 0.5).max() < 0.012
    assert abs(np.corrcoef(uniforms.T) - np.eye(4)).max() < 0.04
    counts = np.histogram(uniforms[:, 0], bins=20, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8  # chi-square, 19 degrees of freedom, 99.9 %


def test_uniforms_differ_by_seed_epoch_row_and_column():
    numbers = [sample_uniforms(seed, epoch, np.arange(3), 3) for seed in (0, 1) for epoch in (0, 1)]
    assert len(np.unique(np.stack(numbers))) == 2 * 2 * 3 * 3


def test_a_samples_crop_does_not_depend_on_its_batch():
    heights, widths = np.arange(50, 150), np.arange(150, 50, -1)
    everything = random_resized_crops(1, 2, np.arange(100), heights, widths, SCALE, RATIO, True)
    chosen = np.array([99, 3, 42])
    some = random_resized_crops(1, 2, chosen, heights[chosen], widths[chosen], SCALE, RATIO, True)
    alone = random_resized_crops(1, 2, chosen[:1], heights[chosen[:1]], widths[chosen[:1]], SCALE, RATIO, True)
    for part in (0, 1):
        assert np.array_equal(everything[part][chosen], some[part])
        assert np.array_equal(some[part][:1], alone[part])


@pytest.mark.parametrize(("height", "width"), [(375, 500), (64, 64), (40, 400), (400, 40), (3, 2)])
def test_crops_are_distributed_as_torchvisions(height, width):
    num_draws = 4000
    boxes, _ = boxes_of(num_draws, height, width)
    image = torch.empty(3, height, width)
    transform = v2.RandomResizedCrop(8, SCALE, RATIO)
    drawn = [transform.make_params([image]) for _ in range(num_draws)]
    expected = np.array([[draw[key] for key in ("top", "left", "height", "width")] for draw in drawn])
    tops, lefts, heights, widths = boxes.T
    assert boxes.dtype == np.int64
    assert (tops >= 0).all() and (lefts >= 0).all() and (heights > 0).all() and (widths > 0).all()
    assert (tops + heights <= height).all() and (lefts + widths <= width).all()
    for column in range(4):
        ours, theirs = np.sort(boxes[:, column]), np.sort(expected[:, column])
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
def test_where_no_try_fits_the_center_is_taken(height, width, ratio, box):
    boxes, _ = boxes_of(50, height, width, scale=(0.9, 1.0), ratio=ratio)
    expected = v2.RandomResizedCrop(8, (0.9, 1.0), ratio).make_params([torch.empty(3, height, width)])
    assert [expected[key] for key in ("top", "left", "height", "width")] == box
    assert (boxes == box).all()


def test_full_scale_and_ratio_one_crop_nothing_of_a_square_image():
    boxes, _ = boxes_of(100, 64, 64, scale=(1, 1), ratio=(1, 1))
    assert (boxes == [0, 0, 64, 64]).all()


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


def test_pixels_outside_the_window_change_nothing():
    image = torch.rand(1, 3, 20, 30)
    box = np.array([[4, 6, 9, 11]])
    changed = image.clone()
    changed[:, :, :4] = changed[:, :, 13:] = 99
    changed[:, :, :, :6] = changed[:, :, :, 17:] = 99
    mirrored = np.array([False])
    assert torch.equal(crop_and_resize(image, box, mirrored, 7), crop_and_resize(changed, box, mirrored, 7))


def test_a_window_of_the_wanted_size_is_copied():
    image = torch.rand(1, 3, 20, 30)
    out = crop_and_resize(image, np.array([[4, 6, 9, 9]]), np.array([False]), 9)
    torch.testing.assert_close(out, image[:, :, 4:13, 6:15])


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
def test_normalised_images_are_float32_channels_last(dtype):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    images = torch.randint(0, 256, (4, 3, 8, 9), dtype=torch.uint8)
    out = normalize(images.to(dtype), mean, std)
    assert out.dtype == torch.float32 and out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, functional.normalize(images / 255, list(mean), list(std)))
