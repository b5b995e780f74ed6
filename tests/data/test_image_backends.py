"""The two backends keep one contract."""

import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.io import encode_jpeg

from mrl.data import build_data
from mrl.data.folder import FolderImages
from mrl.data.folder import _start_worker as start_worker
from mrl.data.memory import MemoryImages
from mrl.data.transforms import eval_indices, random_resized_crops, train_indices
from mrl.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
# One gray level in normalized units is 1 / (255 * 0.224); torchvision rounds twice when it resizes uint8.
TWO_LEVELS = 2 / 255 / 0.224


@pytest.fixture
def both(two_classes):
    """The same images, 48 px, by both backends."""
    parts = {name: build_data(two_classes.config(backend=name), 3, CPU, is_main=False) for name in ("memory", "folder")}
    assert isinstance(parts["memory"]["train"], MemoryImages) and isinstance(parts["folder"]["train"], FolderImages)
    return parts


def stacked(batches):
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


@pytest.mark.parametrize("px", [48, 32, 64])
def test_both_backends_cut_the_same_training_crops(both, px):
    rows = train_indices(7, 7, seed=3, epoch=1)
    (memory, labels), (folder, folder_labels) = (stacked(both[n]["train"].train_batches(rows, 1, px)) for n in both)
    assert memory.shape == (7, 3, px, px)
    torch.testing.assert_close(memory, folder, atol=TWO_LEVELS, rtol=0)
    assert torch.equal(labels, folder_labels)
    assert torch.equal(labels, both["memory"]["train"].labels[rows[0]])
    # The tolerance tells crops apart: those of another epoch are far away.
    other, _ = stacked(both["folder"]["train"].train_batches(rows, 2, px))
    assert (memory - other).abs().max() > 10 * TWO_LEVELS


@pytest.mark.parametrize("flip", [False, True])
def test_both_backends_evaluate_the_same_pixels(both, flip):
    rows = eval_indices(5, 2)
    (memory, labels), (folder, _) = (stacked(both[name]["val"].eval_batches(rows, flip)) for name in both)
    assert memory.shape == (5, 3, 40, 40)
    assert torch.equal(memory, folder)
    assert labels.tolist() == [0, 0, 1, 1, 1]


@pytest.mark.parametrize("backend", ["memory", "folder"])
def test_flip_mirrors_every_image(both, backend):
    val, rows = both[backend]["val"], eval_indices(5, 5)
    straight, _ = stacked(val.eval_batches(rows))
    mirrored, _ = stacked(val.eval_batches(rows, flip=True))
    assert torch.equal(straight.flip(3), mirrored)


@pytest.mark.parametrize("backend", ["memory", "folder"])
def test_batches_keep_the_contract(both, backend):
    train = both[backend]["train"]
    for images, labels in [
        *train.train_batches(train_indices(7, 3, 0, 0), 0, 32),
        *train.eval_batches(eval_indices(7, 3)),
    ]:
        assert images.dtype == torch.float32 and images.is_contiguous(memory_format=torch.channels_last)
        assert labels.dtype == torch.int64 and len(labels) == len(images)
    (as_list, _), (as_array, _) = (next(train.eval_batches([rows])) for rows in ([6, 2], np.array([6, 2])))
    assert torch.equal(as_list, as_array)
    assert train.classes == ["a", "b"]
    assert train.labels.dtype == torch.int64 and train.labels.device == CPU and len(train) == len(train.labels) == 7


@pytest.mark.parametrize("backend", ["memory", "folder"])
def test_an_image_is_the_same_in_any_batch_on_all_reduce_any(both, backend):
    train = both[backend]["train"]
    whole, _ = stacked(train.train_batches([np.arange(7)], 4, 32))
    single, _ = stacked(train.train_batches([np.array([row]) for row in range(7)], 4, 32))
    torch.testing.assert_close(whole, single, atol=1e-5, rtol=0)
    shares = [train_indices(7, 6, 0, 4, rank, 2) for rank in (0, 1)]
    two, _ = stacked([batch for share in shares for batch in train.train_batches(share, 4, 32)])
    torch.testing.assert_close(two, whole[np.concatenate([share[0] for share in shares])], atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_number_of_workers_changes_nothing(two_classes, num_workers):
    rows = train_indices(7, 2, 0, 0)
    expected = build_data(two_classes.config(), 0, CPU, is_main=False)["train"].train_batches(rows, 0, 32)
    found = build_data(two_classes.config(num_workers=num_workers), 0, CPU, is_main=False)["train"].train_batches(
        rows, 0, 32
    )
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


@pytest.mark.parametrize("backend", ["memory", "folder"])
def test_reading_data_leaves_the_global_generator_alone(both, backend):
    before = torch.get_rng_state()
    list(both[backend]["train"].train_batches(train_indices(7, 2, 0, 0), 0, 32))
    list(both[backend]["val"].eval_batches(eval_indices(5, 2)))
    assert torch.equal(before, torch.get_rng_state())


def test_labels_stay_distinct_where_float16_would_merge_them(transform):
    labels = torch.arange(70_000)
    pixels = torch.zeros(1, 3, 48, 48, dtype=torch.uint8).expand(70_000, -1, -1, -1)
    small = dataclasses.replace(transform, eval_px=8)
    images = MemoryImages(pixels, labels, [], small, CPU)
    rows = [np.arange(start, start + 50) for start in (0, 2048, 65_500, 69_950)]
    _, found = stacked(images.eval_batches(rows))
    assert found.tolist() == np.concatenate(rows).tolist()


def test_stored_images_are_cropped_where_the_boxes_say(transform):
    # Each pixel holds its place, so a crop's mean tells its center.
    place = torch.arange(48).float() * 5
    image = torch.stack([place.expand(48, 48), place.expand(48, 48).T, torch.zeros(48, 48)]).to(torch.uint8)
    plain = dataclasses.replace(transform, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    images = MemoryImages(image.expand(9, -1, -1, -1), torch.zeros(9, dtype=torch.int64), ["a"], plain, CPU)
    (crops, _) = next(images.train_batches([np.arange(9)], epoch=6, px=24))
    sides = np.full(9, 48)
    boxes, _ = random_resized_crops(5, 6, np.arange(9), sides, sides, (0.25, 1.0), (3 / 4, 4 / 3), True)
    found = crops.mean(dim=(2, 3))[:, :2] * 255 / 5  # left to right, top to bottom
    centers = np.stack([boxes[:, 1] + (boxes[:, 3] - 1) / 2, boxes[:, 0] + (boxes[:, 2] - 1) / 2], axis=1)
    torch.testing.assert_close(found.double(), torch.from_numpy(centers), atol=0.05, rtol=0)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("content", [b"not an image", b"", None], ids=["text", "empty", "truncated"])
def test_a_corrupt_image_names_its_path(two_classes, num_workers, content):
    path = two_classes.root / "train" / "b" / "1.jpg"
    (path.parent / "1.png").unlink()
    if content is None:
        whole = encode_jpeg(torch.randint(0, 256, (3, 48, 48), dtype=torch.uint8)).numpy().tobytes()
        content = whole[: len(whole) // 2]
    path.write_bytes(content)
    train = build_data(two_classes.config(num_workers=num_workers), 0, CPU, is_main=False)["train"]
    with pytest.raises(UserError, match="cannot be read as an image") as raised:
        list(train.train_batches(train_indices(7, 1, 0, 0), 0, 32))
    assert str(raised.value).startswith(str(path)) and "Traceback" not in str(raised.value)
    with pytest.raises(UserError, match=str(path)):
        build_data(two_classes.config(backend="memory"), 0, CPU, is_main=False)


def test_a_stop_signal_to_all_processes_leaves_the_batches_coming(two_classes):
    train = build_data(two_classes.config(num_workers=2), 0, CPU, is_main=False)["train"]
    batches = train.train_batches([np.array([row % 7]) for row in range(40)], 0, 32)
    before = set(multiprocessing.active_children())
    next(batches)
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    for worker in workers:
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGINT)
    assert len(list(batches)) == 39


def test_a_stop_signal_to_a_worker_that_is_still_starting_does_not_end_it(two_classes, monkeypatch):
    def stopped_at_once(worker):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        start_worker(worker)

    monkeypatch.setattr("mrl.data.folder._start_worker", stopped_at_once)
    train = build_data(two_classes.config(num_workers=2), 0, CPU, is_main=False)["train"]
    assert len(list(train.train_batches([np.array([row]) for row in range(7)], 0, 32))) == 7


def test_an_image_that_cannot_be_read_ends_the_workers_too(two_classes):
    (two_classes.root / "train" / "b" / "1.png").write_bytes(b"not an image")
    train = build_data(two_classes.config(num_workers=2), 0, CPU, is_main=False)["train"]
    before = set(multiprocessing.active_children())
    with pytest.raises(UserError) as raised:
        list(train.train_batches(train_indices(7, 1, 0, 0), 0, 32))
    assert raised.value.__traceback__ is not None  # which holds on to the frames that it went through
    assert set(multiprocessing.active_children()) <= before


def test_a_process_ends_although_a_pass_is_unfinished(two_classes):
    """Workers ignore the SIGTERM that multiprocessing sends them at exit; it would wait for them for ever."""
    program = (
        "import sys, torch; from mrl.config import DataConfig; from mrl.data import build_data\n"
        "config = DataConfig(name='folder', root=sys.argv[1], num_workers=2)\n"
        "images = build_data(config, 0, torch.device('cpu'), is_main=False)['train']\n"
        "batches = images.train_batches([[0], [1], [2], [3]], 0, 32); next(batches); print('unfinished')\n"
    )
    command = [sys.executable, "-c", program, two_classes.root]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, "unfinished\n", "")
