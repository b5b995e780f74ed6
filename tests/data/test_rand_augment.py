import random

import numpy as np
import pytest
import torch
from PIL import ImageOps
from timm.data.auto_augment import rand_augment_transform
from torchvision.transforms.v2 import functional

from mrl.config import DataConfig
from mrl.data import build_data, check_rand_augment
from mrl.data.transforms import _posterize, counter_hash, rand_augment
from mrl.errors import UserError

CPU = torch.device("cpu")
MEAN = (0.4, 0.5, 0.6)
RAW = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255), "eval_resize_px": 48, "eval_px": 40}


@pytest.fixture
def image():
    return torch.randint(256, (3, 40, 40), dtype=torch.uint8)


def test_it_is_timms_with_the_generators_seeded_by_the_sample(image):
    words, expected = "rand-m9-n2-mstd0.5-inc1", []
    augment = rand_augment_transform(words, {"translate_const": 18, "img_mean": (102, 128, 153)})
    for row in range(20):
        bits = int(counter_hash(2, 5, 3, row)[0])
        random.seed(bits)
        np.random.seed(bits % 2**32)  # noqa: NPY002
        expected.append(functional.pil_to_tensor(augment(functional.to_pil_image(image))))
    found = [rand_augment(image, words, MEAN, 5, 3, row) for row in range(20)]
    assert torch.equal(torch.stack(found), torch.stack(expected))
    assert len({tuple(one.flatten().tolist()) for one in found}) > 10


def test_the_global_generators_stay_as_they_were(image):
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    rand_augment(image, "rand-m9-mstd0.5", MEAN, 0, 0, 0)
    assert random.getstate() == before[0]
    assert all(np.array_equal(*pair) for pair in zip(np.random.get_state(), before[1], strict=True))  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.parametrize("kind", ["", "-inc1", "-tweights", "-t3a", "-t3aw"])
@pytest.mark.parametrize("strength", ["-m0", "-m10", "-m9-mstd2", "-m9-mmax20-mstd101"])
def test_every_operation_works_at_every_strength(image, kind, strength):
    """Pillow refuses to posterize to no bits, which timm asks for at magnitude 10 (fault of timm 1.0.31, Pillow 13)."""
    words = DataConfig(rand_augment=f"rand-n9-p1{strength}{kind}").rand_augment
    assert words is not None
    for row in range(5):
        assert rand_augment(image, words, MEAN, 0, 0, row).shape == image.shape


@pytest.mark.parametrize("bits", range(1, 9))
def test_posterizing_is_pillows_where_pillow_takes_it(image, bits):
    picture = functional.to_pil_image(image)
    assert _posterize(picture, bits).tobytes() == ImageOps.posterize(picture, bits).tobytes()
    assert not any(_posterize(picture, 0).tobytes())


def test_what_happens_to_a_sample_depends_on_neither_worker_nor_batch_nor_order(two_classes):
    def trained(num_workers, rows, epoch=0, words="rand-m9-mstd0.5-inc1"):
        config = two_classes.config(num_workers=num_workers, rand_augment=words, **RAW)
        images = build_data(config, 3, CPU, is_main=False)["train"]
        batches = torch.cat([batch for batch, _ in images.train_batches(rows, epoch, 40)])
        return dict(zip(np.concatenate(rows).tolist(), batches, strict=True))

    first = trained(0, [np.arange(4), np.arange(4, 7)])
    second = trained(2, [np.array([6, 0]), np.array([1, 5, 3]), np.array([2, 4])])
    assert all(torch.equal(first[row], second[row]) for row in range(7))
    later, plain = trained(0, [np.arange(7)], epoch=1), trained(0, [np.arange(7)], words=None)
    assert sum(torch.equal(first[row], later[row]) for row in range(7)) < 3
    assert sum(torch.equal(first[row], plain[row]) for row in range(7)) < 5  # half of the operations are left out


def test_evaluation_is_not_augmented(two_classes):
    with_it, without = (
        next(build_data(two_classes.config(rand_augment=words), 3, CPU, False)["val"].eval_batches([np.arange(5)]))[0]
        for words in ("rand-m9", None)
    )
    assert torch.equal(with_it, without)


def test_images_in_memory_are_refused_in_a_sentence(two_classes):
    config = two_classes.config(backend="memory", rand_augment="rand-m9")
    images = build_data(config, 3, CPU, is_main=False)  # for evaluation they will do
    with pytest.raises(UserError, match=r"data\.rand_augment is 'rand-m9', but .*--data\.backend folder"):
        check_rand_augment(config, images["train"])
    check_rand_augment(two_classes.config(backend="memory"), images["train"])
