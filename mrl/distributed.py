"""Processes that train one model together: the only file that touches torch.distributed.

Started by torchrun there are several; started by plain python there is one, and every function
here is then the obvious thing for one process.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from mrl.errors import UserError

# In that time torchrun ends this process, if another one on the machine has ended.
SECONDS_TO_END = 5.0


@dataclass(frozen=True)
class Process:
    """This process among all: ``rank`` of ``world_size``, computing on ``device``."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one process that writes files and prints."""
        return self.rank == 0


def start() -> Process:
    """This process, after joining the others when torchrun started it (nccl on GPUs, gloo on CPU).

    Raises:
        UserError: More processes were started than there are GPUs.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.is_available() and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"{local_rank + 1} or more processes were started on a machine with {torch.cuda.device_count()} GPUs; "
            "allowed: torchrun --nproc_per_node up to the number of GPUs"
        )
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "WORLD_SIZE" not in os.environ:
        return Process(rank=0, world_size=1, device=device)
    # CPU tensors go by gloo also on GPU machines: a stop flag can be agreed on without waiting for the GPU.
    dist.init_process_group(backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return Process(rank=dist.get_rank(), world_size=dist.get_world_size(), device=device)


def stop() -> None:
    """Leave the group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


class ElsewhereError(UserError):
    """This process ends because of an error that another one has met, and tells."""


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Within it an error of one process ends all of them, and only that error is shown, once on each machine.

    torchrun ends the processes of a machine when it sees that one of them has ended. So those that may have met what
    the first one also met give it time for that before they speak, and those that have met nothing give it longer.

    Raises:
        ElsewhereError: The connection to another process is lost, and torchrun has not ended this one.
    """
    try:
        yield
    except Exception as error:
        lost = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
        if "WORLD_SIZE" in os.environ:
            elsewhere = lost or isinstance(error, ElsewhereError)
            time.sleep(SECONDS_TO_END * (2 * elsewhere + (not _is_first_on_machine())))
        if lost:
            reason = str(error).split("] ", 1)[-1].split(". ")[0]
            raise ElsewhereError(
                f"another process has ended or cannot be reached ({reason}); see what that one said"
            ) from error
        raise


def _is_first_on_machine() -> bool:
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


@contextlib.contextmanager
def local_main_first() -> Iterator[None]:
    """What stands within it is done by one process of each machine, and then by the others."""
    if not _is_first_on_machine():
        barrier()
    yield  # after an error there is no barrier: whoever waits for it ends too
    if _is_first_on_machine():
        barrier()


def barrier() -> None:
    """Wait until every process is here."""
    if dist.is_initialized():
        dist.barrier()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum of ``tensor`` over all processes, the same on each; a new tensor."""
    total = tensor.clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


def all_reduce_any(*flags: bool) -> list[bool]:
    """For each flag, whether it is true on at least one process; the same on all."""
    return [bool(count) for count in all_reduce_sum(torch.tensor([int(flag) for flag in flags])).tolist()]


def agree(number: int) -> bool:
    """Whether all processes give the same ``number`` (-2^63 < number < 2^63); the same answer on all."""
    if not dist.is_initialized():
        return True
    ends = torch.tensor([number, -number])
    dist.all_reduce(ends, op=dist.ReduceOp.MAX)
    return bool(ends[0] == -ends[1])


def broadcast_buffers(module: nn.Module) -> None:
    """Give every process the main one's buffers (BatchNorm statistics), which differ while each sees its own images."""
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def sync_batchnorm(model: nn.Module, process: Process) -> nn.Module:
    """``model``, its BatchNorms replaced by ones that see the images of all processes; same weights, same names.

    Raises:
        UserError: The processes compute on CPUs, for which torch has no such BatchNorm.
    """
    if process.device.type != "cuda":
        raise UserError("train.sync_batchnorm is true, but it needs GPUs; allowed on the CPU: false")
    # timm's, because torch's would drop the activation that some BatchNorms of timm contain.
    return model if process.world_size == 1 else convert_sync_batchnorm(model)


def data_parallel(
    model: nn.Module, process: Process, gradient_precision: Literal["fp32", "bf16"] = "fp32"
) -> nn.Module:
    """``model`` with gradients averaged over processes after each backward pass; itself when there is one process."""
    if process.world_size == 1:
        return model
    device_ids = [process.device.index] if process.device.type == "cuda" else None
    parallel = DistributedDataParallel(model, device_ids=device_ids)
    if gradient_precision == "bf16":
        parallel.register_comm_hook(dist.group.WORLD, bf16_compress_hook)
    return parallel


def shared_gradients(model: nn.Module, share: bool) -> contextlib.AbstractContextManager[None]:
    """While it lasts, backward passes average gradients over processes only if ``share`` (the last micro-batch)."""
    if share or not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()
