import dataclasses
import functools
import shutil
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from mrl import distributed, rundir
from mrl.distributed import Process
from mrl.errors import UserError
from mrl.retrieval.embeddings import EmbeddingMetadata, alone_in, embed_split, open_embeddings

ALONE = Process(0, 1, torch.device("cpu"))
METADATA = EmbeddingMetadata("0123", "digits", "val", 32, 28, "mean 0, std 1", False, "4567")
WIDTH = 3


class Images:
    """Images whose pixels say which they are; counts how often each is read."""

    def __init__(self, num_images, labels=None):
        self.labels = torch.arange(num_images) % 5 if labels is None else labels
        self.reads = Counter()

    def __len__(self):
        return len(self.labels)

    def eval_batches(self, indices, flip=False):
        for batch in indices:
            self.reads.update(batch.tolist())
            sign = -1 if flip else 1
            yield sign * torch.from_numpy(batch).float().view(-1, 1, 1, 1).expand(-1, 3, 2, 2), self.labels[batch]


def embed(images):
    return torch.stack([images[:, 0, 0, 0] * scale for scale in (1, 2, -1)], dim=1)


def run(directory, images, embed=embed, metadata=METADATA, process=ALONE, batch_size=4):
    return embed_split(directory, metadata, images, embed, WIDTH, process, batch_size)


def assert_right(found, images):
    numbers = np.arange(len(images), dtype=np.float32) * (-1 if found.metadata.flip else 1)
    np.testing.assert_array_equal(found.vectors, np.stack([numbers, 2 * numbers, -numbers], axis=1))
    np.testing.assert_array_equal(found.labels, images.labels.numpy())
    assert (found.vectors.dtype, found.labels.dtype) == (np.float32, np.int64)


# 9 = 4 + 4 + 1: the last batch has one image.
@pytest.mark.parametrize("num_images", [1, 8, 9])
def test_fault_11_rows_come_in_dataset_order_also_in_a_last_batch_of_one_image(tmp_path, num_images):
    images, again = (Images(num_images, torch.arange(num_images) + 2**40) for _ in range(2))
    assert_right(run(tmp_path / "val", images), images)
    assert set(images.reads.values()) == {1}
    assert_right(run(tmp_path / "val", again), again)
    assert not again.reads, "equal metadata: used again"


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(EmbeddingMetadata)])
def test_other_metadata_is_computed_again(tmp_path, field):
    run(tmp_path / "val", Images(9))
    value = {"flip": True, "trained_dims": [2, 3], "resize_px": 64, "crop_px": 30}.get(field, "other")
    other = dataclasses.replace(METADATA, **{field: value})
    assert open_embeddings(tmp_path / "val", other) is None
    images = Images(6)
    assert_right(run(tmp_path / "val", images, metadata=other), images)  # mirrored if it says so
    assert len(images.reads) == 6
    assert open_embeddings(tmp_path / "val", METADATA) is None


@pytest.mark.parametrize("kept", [-10, 0])
@pytest.mark.parametrize("file", ["vectors.npy", "labels.npy", "metadata.json"])
def test_a_file_cut_short_is_computed_again(tmp_path, file, kept):
    run(tmp_path / "val", Images(9))
    path = tmp_path / "val" / file
    path.write_bytes(path.read_bytes()[:kept])
    images = Images(9)
    assert_right(run(tmp_path / "val", images), images)
    assert len(images.reads) == 9


def stopping_embed(stop_at):
    def stop(images, width=WIDTH):
        if stop_at in images[:, 0, 0, 0]:
            raise KeyboardInterrupt
        return embed(images)[:, :width]

    return stop


def stop(directory, images, stop_at, **rest):
    with pytest.raises(KeyboardInterrupt):
        run(directory, images, embed=stopping_embed(stop_at), **rest)


def test_a_killed_pass_continues_after_its_last_whole_row_at_another_batch_size_and_may_stop_again(tmp_path):
    stop(tmp_path / "val", Images(22), 13)
    assert open_embeddings(tmp_path / "val", METADATA) is None
    [part] = (tmp_path / "val").glob("part-*")
    with part.open("ab") as file:
        file.write(b"\x01" * (4 * WIDTH - 1))
    (tmp_path / "val" / "part-000000000016").write_bytes(b"")
    images = Images(22)
    stop(tmp_path / "val", images, 18, batch_size=3)
    assert_right(run(tmp_path / "val", images, batch_size=5), images)
    assert images.reads == Counter(range(12, 22)) + Counter([18, 19, 20])  # three of a batch that was stopped


@pytest.mark.parametrize("copied", [0, 5, 4 * WIDTH * 10])
def test_a_join_that_was_killed_continues(tmp_path, monkeypatch, copied):
    stop(tmp_path / "val", Images(22), 13)  # so that there are two parts

    def killed(source, target, size):
        target.write(source.read(copied))
        target.flush()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("mrl.retrieval.embeddings.shutil.copyfileobj", killed)
        run(tmp_path / "val", Images(22))
    images = Images(22)
    assert_right(run(tmp_path / "val", images), images)
    assert not images.reads
    assert sorted(path.name for path in (tmp_path / "val").iterdir()) == ["labels.npy", "metadata.json", "vectors.npy"]


@pytest.mark.parametrize("change", ["model", "number of images", "width"])
def test_parts_of_another_pass_are_not_used(tmp_path, change):
    metadata = dataclasses.replace(METADATA, checkpoint_sha256="89ab") if change == "model" else METADATA
    width, num_images = 2 if change == "width" else WIDTH, 8 if change == "number of images" else 9
    with pytest.raises(KeyboardInterrupt):
        narrow = functools.partial(stopping_embed(5), width=width)
        embed_split(tmp_path / "val", metadata, Images(num_images), narrow, width, ALONE, 4)
    images = Images(9)
    assert_right(run(tmp_path / "val", images), images)
    assert len(images.reads) == 9


def test_finished_vectors_of_another_width_are_computed_again(tmp_path):
    embed_split(tmp_path / "val", METADATA, Images(9), lambda images: embed(images)[:, :2], 2, ALONE, 4)
    images = Images(9)
    assert_right(run(tmp_path / "val", images), images)


def test_two_commands_at_once_embed_every_image_once(tmp_path, monkeypatch):
    images, is_waiting = [Images(9), Images(9)], threading.Event()
    monkeypatch.setattr(rundir.tqdm, "write", lambda notice: is_waiting.set())

    def patient(batch):
        assert is_waiting.wait(30)
        return embed(batch)

    def command(number):
        with alone_in(tmp_path / "val", ALONE):
            return run(tmp_path / "val", images[number], patient)

    with ThreadPoolExecutor(2) as threads:
        for found in threads.map(command, (0, 1)):
            assert_right(found, images[0])
    assert images[0].reads + images[1].reads == Counter(range(9))
    with alone_in(tmp_path / "val", ALONE, force=True):
        assert open_embeddings(tmp_path / "val", METADATA) is None
    with alone_in(tmp_path / "empty", ALONE):
        pass
    assert not (tmp_path / "empty").exists()


def test_a_command_that_waited_for_a_removed_folder_keeps_others_out_of_the_new_one(tmp_path, monkeypatch):
    waiting, entered, inside = threading.Semaphore(0), threading.Event(), []
    monkeypatch.setattr(rundir.tqdm, "write", lambda notice: waiting.release())

    def command(number):
        with alone_in(tmp_path / "val", ALONE):
            inside.append(number)
            entered.set()
            assert number == 2 or waiting.acquire(timeout=30)  # until the last one waits too
            inside.append(number)

    with ThreadPoolExecutor(2) as threads:
        with alone_in(tmp_path / "val", ALONE):
            threads.submit(command, 1)
            assert waiting.acquire(timeout=30)
            (tmp_path / "val").rmdir()
        assert entered.wait(30)
        threads.submit(command, 2).result()
    assert inside == [1, 1, 2, 2]


@pytest.fixture
def two_processes(monkeypatch):
    """Runs a function as process 0 and 1 of two, in threads that really wait for each other."""
    meeting, here, given = threading.Barrier(2, timeout=30), threading.local(), [None, None]

    def all_reduce_sum(tensor):
        given[here.rank] = tensor
        meeting.wait()
        total = given[0] + given[1]
        meeting.wait()
        return total

    def start(function):
        def as_process(rank):
            here.rank = rank
            try:
                return function(Process(rank, 2, torch.device("cpu")))
            except BaseException as error:
                return error

        with monkeypatch.context() as patch, ThreadPoolExecutor(2) as threads:
            patch.setattr(distributed, "barrier", meeting.wait)
            patch.setattr(distributed, "all_reduce_sum", all_reduce_sum)
            return list(threads.map(as_process, (0, 1)))

    return start


@pytest.mark.parametrize("num_images", [1, 9, 22])
def test_two_processes_embed_every_image_once_and_both_see_all(tmp_path, two_processes, num_images):
    images = [Images(num_images), Images(num_images)]
    for found in two_processes(lambda process: run(tmp_path / "val", images[process.rank], process=process)):
        assert_right(found, images[0])
    assert images[0].reads + images[1].reads == Counter(range(num_images))


def test_one_process_finishes_what_two_began_and_two_what_one_began(tmp_path, two_processes):
    def by_two(images, embed=lambda rank: embed):
        def start(process):
            return run(tmp_path / "val", images[process.rank], embed=embed(process.rank), process=process)

        return two_processes(start)

    # An interrupt in both, so that neither waits for the other.
    interrupted = by_two([Images(22), Images(22)], lambda rank: stopping_embed(21 if rank else 9))
    assert {type(result) for result in interrupted} == {KeyboardInterrupt}
    images = Images(22)
    assert_right(run(tmp_path / "val", images), images)
    assert sorted(images.reads) == [8, 9, 10, 19, 20, 21]
    shutil.rmtree(tmp_path / "val")
    stop(tmp_path / "val", Images(22), 9)
    parts = [Images(22), Images(22)]
    for found in by_two(parts):
        assert_right(found, images)
    assert [sorted(part.reads) for part in parts] == [list(range(8, 15)), list(range(15, 22))]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_embedding_that_is_not_finite_is_refused_by_all_naming_the_image(tmp_path, two_processes, value):
    def broken(images):
        z = embed(images)
        z[(images[:, 0, 0, 0] == 16) | (images[:, 0, 0, 0] == 17), 1] = value
        return z

    first, second = two_processes(lambda process: run(tmp_path / "val", Images(22), embed=broken, process=process))
    assert isinstance(second, UserError) and "image 16 (val split) holds NaN" in str(second)
    assert isinstance(first, distributed.ElsewhereError)
    images = Images(22)
    assert_right(run(tmp_path / "val", images), images)


def test_a_full_disk_is_noticed_before_the_pass(tmp_path, monkeypatch):
    monkeypatch.setattr("mrl.retrieval.embeddings.shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(UserError, match="GiB"):
        run(tmp_path / "val", Images(9))


def test_bf16_rounds_the_forward_pass_and_is_never_taken_for_fp32(tmp_path):
    images, layer = Images(6), torch.nn.Linear(3 * 2 * 2, WIDTH)

    def embed_linear(batch):
        return layer(batch.flatten(1))

    exact = run(tmp_path / "val", images, embed_linear).vectors.copy()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        rounded = embed_linear(next(images.eval_batches([np.arange(6)]))[0]).float().numpy()
    in_bf16 = dataclasses.replace(METADATA, precision="bf16")
    np.testing.assert_array_equal(run(tmp_path / "val", images, embed_linear, in_bf16).vectors, rounded)
    assert not np.array_equal(exact, rounded)
    assert open_embeddings(tmp_path / "val", METADATA) is None
