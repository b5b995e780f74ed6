import socket
from pathlib import Path

import pytest
import torch
from torch import nn

from mrl import distributed
from mrl.distributed import Process
from mrl.errors import UserError
from mrl.model import build_backbone, build_model
from mrl.training.profiling import all_reduce_seconds

NUM_PROCESSES, NUM_MICRO_BATCHES = 2, 3


def make_model_and_batches():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    return model, torch.randn(NUM_PROCESSES, NUM_MICRO_BATCHES, 2, 6)


def work(rank: int, directory: Path) -> None:
    """On one of two processes: gradients and all-reduces of three micro-batches, in both precisions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", str(rank))
        patch.setenv("LOCAL_RANK", str(rank))
        process = distributed.start()
        found = {}
        for precision in ("fp32", "bf16"):
            model, batches = make_model_and_batches()
            parallel = distributed.data_parallel(model, process, precision)
            seconds = []
            for micro_batch, images in enumerate(batches[rank]):
                with torch.profiler.profile() as profile:
                    with distributed.shared_gradients(parallel, micro_batch == NUM_MICRO_BATCHES - 1):
                        (parallel(images).square().mean() / NUM_MICRO_BATCHES).backward()
                    distributed.barrier()
                seconds.append(all_reduce_seconds(profile.events(), process.device))
            found[precision] = {"gradients": [p.grad for p in model.parameters()], "all_reduces": seconds}
        torch.save(found, directory / f"{rank}.pt")
        distributed.stop()


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory):
    directory = tmp_path_factory.mktemp("processes")
    with pytest.MonkeyPatch.context() as patch, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        patch.setenv("MASTER_PORT", str(free.getsockname()[1]))
        patch.setenv("WORLD_SIZE", str(NUM_PROCESSES))
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        free.close()
        torch.multiprocessing.spawn(work, (directory,), nprocs=NUM_PROCESSES)
    return [torch.load(directory / f"{rank}.pt") for rank in range(NUM_PROCESSES)]


def on_one_process():
    model, batches = make_model_and_batches()
    model(batches.flatten(0, 2)).square().mean().backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_accumulated_gradients_cross_the_network_once_a_step(of_two_processes, precision):
    for found in of_two_processes:
        *before, last = found[precision]["all_reduces"]
        assert before == [0.0] * (NUM_MICRO_BATCHES - 1)
        assert last > 0


def test_they_are_the_mean_over_all_images_whatever_the_number_of_processes(of_two_processes):
    for found in of_two_processes:
        torch.testing.assert_close(found["fp32"]["gradients"], on_one_process())


def test_in_bf16_they_are_the_same_rounded_and_equal_on_all_processes(of_two_processes):
    first, second = (found["bf16"]["gradients"] for found in of_two_processes)
    for left, right, exact in zip(first, second, on_one_process(), strict=True):
        assert torch.equal(left, right)
        assert torch.equal(left, left.bfloat16().float())
        torch.testing.assert_close(left, exact, rtol=2**-6, atol=1e-3)


def test_sync_batchnorm_keeps_weights_names_and_activations():
    """timm's BatchNorms of an EfficientNet hold its activations."""
    model = build_model(build_backbone("efficientnet_b0"), 5).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
    images = torch.randn(2, 3, 32, 32)
    before, names = model(images), list(model.state_dict())
    two_gpus = Process(rank=0, world_size=2, device=torch.device("cuda", 0))
    changed = distributed.sync_batchnorm(model, two_gpus)
    norms = [module for module in changed.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 49 and all(isinstance(module, nn.SyncBatchNorm) for module in norms)
    assert list(changed.state_dict()) == names
    torch.testing.assert_close(changed(images), before)


def test_sync_batchnorm_changes_nothing_on_one_gpu_and_is_refused_on_the_cpu():
    model = build_model(build_backbone("resnet10t"), 5)
    one_gpu = Process(rank=0, world_size=1, device=torch.device("cuda", 0))
    assert distributed.sync_batchnorm(model, one_gpu) is model
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    with pytest.raises(UserError, match=r"train\.sync_batchnorm is true, but it needs GPUs"):
        distributed.sync_batchnorm(model, Process(rank=0, world_size=2, device=torch.device("cpu")))
