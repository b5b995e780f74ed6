import numpy as np
import pytest
import torch

from mrl.config import DataConfig
from mrl.errors import UserError
from mrl.training.augmentation import make_augmentation, seed_step

CPU = torch.device("cpu")
LABELS = torch.tensor([0, 1, 2, 3])


def augmented(step=0, images=None, **settings):
    seed_step(7, step, 0)
    images = torch.zeros(4, 3, 24, 24) if images is None else images
    return make_augmentation(DataConfig(**settings), len(images), 5, CPU)(images.clone(), LABELS)


def test_a_step_is_a_function_of_its_seed():
    settings = {"random_erasing": 0.5, "mixup": 0.4, "cutmix": 1.0}
    images = torch.randn(4, 3, 24, 24)
    first, targets = augmented(3, images, **settings)
    torch.rand(5), np.random.rand(5)  # noqa: NPY002 - whatever was drawn in between
    again, same_targets = augmented(3, images, **settings)
    assert torch.equal(first, again) and torch.equal(targets, same_targets)
    assert not torch.equal(first, augmented(4, images, **settings)[0])
    assert torch.allclose(targets.sum(1), torch.ones(4))


def test_erasing_fills_one_rectangle_of_an_image_with_noise():
    images, targets = augmented(random_erasing=1.0)
    assert targets is LABELS
    for image in images:
        erased = image[0] != 0
        rows, columns = erased.any(1).nonzero(), erased.any(0).nonzero()
        height, width = (int(found.max() - found.min()) + 1 for found in (rows, columns))
        assert erased.sum() == height * width
        assert 0.01 < height * width / 24**2 < 0.4
        assert image[0][erased].unique().numel() == height * width


def test_an_odd_number_of_images_cannot_be_mixed():
    with pytest.raises(
        UserError, match=r"an even number of images per micro-batch; it is 3: data.batch_size must be a multiple of 2"
    ):
        make_augmentation(DataConfig(cutmix=1.0), 3, 5, CPU)
