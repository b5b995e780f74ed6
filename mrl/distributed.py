"""Several processes that work together, and how every command ends: with a status and, on errors, one sentence.

This is the only file that imports torch.distributed. torchrun starts several processes. Plain python starts one, for
which every function here does the obvious thing.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from mrl.errors import UserError

SECONDS_TO_BE_ENDED = 10.0
_cpu_group: Any = None


@dataclass(frozen=True)
class Process:
    """This process: ``rank`` of ``world_size``, computing on ``device``."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Return True on the one process that writes files and prints."""
        return self.rank == 0


class ElsewhereError(UserError):
    """Raised when another process failed."""


def start() -> Process:
    """Return this process, after joining the others if torchrun started it (nccl on GPUs, gloo on CPUs)."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        index, num_gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if index >= num_gpus:
            raise UserError(
                f"{index + 1} or more processes were started on a machine with {num_gpus} GPUs; allowed: torchrun "
                "--nproc_per_node up to the number of GPUs"
            )
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        return Process(rank=0, world_size=1, device=device)
    global _cpu_group
    dist.init_process_group(backend="nccl" if device.type == "cuda" else "gloo")
    # CPU tensors use gloo on GPU machines too, so that a stop flag does not wait for the GPU. No limit, because one
    # process may wait for another that lists millions of files; connections that are lost are noticed all the same.
    _cpu_group = dist.new_group(backend="gloo", timeout=timedelta(days=365))
    return Process(rank=dist.get_rank(), world_size=dist.get_world_size(), device=device)


def stop() -> None:
    """Leave the process groups."""
    global _cpu_group
    _cpu_group = None
    if dist.is_initialized():
        dist.destroy_process_group()


def run(main: Callable[[], int | None], interrupted: str) -> int:
    """Return the exit status of a script: that of ``main``, 2 after an error the user can fix, 130 after Ctrl-C.

    A KeyboardInterrupt may name another signal as its argument, as `mrl.training.logging.StopSignals` does.

    The error, or ``interrupted``, is shown as one sentence. When one process exits, torchrun ends the others. A process
    that only lost its connection waits for that, so that the one that failed is the first to exit.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # show names that are not UTF-8 as stderr does: "\\udce9" for byte e9
        sys.stdout.reconfigure(errors="backslashreplace")
    warnings.formatwarning = lambda message, *where: f"warning: {message}\n"
    try:
        status = main() or 0
        stop()  # not after an error: NCCL would wait for processes that wait for this one
        return status
    except KeyboardInterrupt as stopped:
        _report(interrupted)
        return 128 + (stopped.args[0] if stopped.args else signal.SIGINT)
    except (UserError, OSError, RuntimeError, MemoryError) as error:
        message = str(error)
        if not isinstance(error, UserError) and (advice := _advice(error, message)):
            error = UserError(f"{(message or 'out of memory').splitlines()[0].strip(' .')}; {advice}")
        elif isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in message):
            message = " ".join(message.split())  # NCCL's cause is in its last line
            error = ElsewhereError(f"lost the connection to another process ({message}); see its error")
        elif not isinstance(error, (UserError, OSError)):
            raise
        if isinstance(error, ElsewhereError):
            time.sleep(SECONDS_TO_BE_ENDED)
        _report(f"error: {error}")
        return 2


def _advice(error: Exception, message: str) -> str:
    """Return what to change if a process, memory or a disk was not large enough for the run, else ""."""
    fewer = "give fewer worker processes (data.num_workers or --num_workers; 0 starts none)"
    number = getattr(error, "errno", None)
    if "shared memory" in message or "Bus error" in message:
        return f"/dev/shm is too small: make it larger (docker run --shm-size 8g, or --ipc host), or {fewer}"
    if "DataLoader worker" in message and "Traceback" not in message:
        return f"a worker process that reads images was killed, most often because the memory was full: {fewer}"
    if "Too many open files" in message or number == errno.EMFILE:
        return f"raise the limit (ulimit -n 65536), or {fewer}"
    if place := out_of_memory(error):
        return "a GPU ran out of memory: lower --batch_size" if place == "a GPU" else f"lower --batch_size, or {fewer}"
    full = number in (errno.ENOSPC, errno.EDQUOT)
    return "free some disk space and start again; files that were finished are kept" if full else ""


def out_of_memory(error: Exception) -> str:
    """Return "a GPU" or "the machine" if its memory was not large enough, else ""."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "a GPU"
    return "the machine" if isinstance(error, MemoryError) or "can't allocate memory" in str(error) else ""


def _report(message: str) -> None:
    """Print ``message`` if this is the first process of a machine; torchrun prints the others' error files."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file is None or os.environ.get("LOCAL_RANK", "0") == "0":
        sys.stderr.write(f"\n{message}\n")  # one write, on a line after the progress bar
    if error_file is not None:
        content = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(error_file).write_text(json.dumps({"message": content}))


def own_share(number: int) -> range:
    """Return the indices below ``number`` that this process works on, if all share them evenly."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return range(rank, number, world_size)


def barrier() -> None:
    """Wait for all processes, as long as it takes."""
    if dist.is_initialized():
        _wait(dist.barrier(group=_cpu_group, async_op=True))


def _wait(work: Any) -> None:
    """Wait for an operation of the CPU group, here instead of in gloo, where no signal is handled."""
    while not work.is_completed():
        time.sleep(0.001)
    work.wait()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Return the sum of ``tensor`` over all processes, as a new tensor."""
    total = tensor.clone()
    if dist.is_initialized():
        if total.is_cuda:
            dist.all_reduce(total)
        else:
            _wait(dist.all_reduce(total, group=_cpu_group, async_op=True))
    return total


def all_reduce_any(*flags: bool) -> list[bool]:
    """Return for each flag whether it is true on at least one process."""
    return all_reduce_sum(torch.tensor(flags, dtype=torch.int64)).bool().tolist()


def agree(number: int) -> bool:
    """Return whether all processes give the same ``number`` (-2^63 < number < 2^63)."""
    ends = torch.tensor([number, -number])
    if dist.is_initialized():
        _wait(dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=_cpu_group, async_op=True))
    return bool(ends[0] == -ends[1])


def broadcast_buffers(module: nn.Module) -> None:
    """Copy the main process's buffers (BatchNorm statistics, which differ between processes) to all."""
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def sync_batchnorm(model: nn.Module, process: Process) -> nn.Module:
    """Return ``model`` with BatchNorms that see the images of all processes; weights and their names stay."""
    if process.device.type != "cuda":
        raise UserError("train.sync_batchnorm is true, but it needs GPUs; allowed on the CPU: false")
    # timm's function keeps the activations inside timm's BatchNorms; torch's drops them.
    return model if process.world_size == 1 else convert_sync_batchnorm(model)


def data_parallel(model: nn.Module, process: Process, precision: Literal["fp32", "bf16"] = "fp32") -> nn.Module:
    """Return ``model`` wrapped to average gradients over processes, in ``precision``; itself if there is only one."""
    if process.world_size == 1:
        return model
    barrier()  # the first operation of NCCL has a limit, and some processes may have to decode more images before it
    parallel = DistributedDataParallel(model, [process.device.index] if process.device.type == "cuda" else None)
    if precision == "bf16":
        # By another name: torch refuses its own hook in builds without CUDA, although gloo can do it.
        parallel.register_comm_hook(dist.group.WORLD, lambda group, bucket: bf16_compress_hook(group, bucket))
    return parallel


def no_sync(model: nn.Module, enabled: bool) -> contextlib.AbstractContextManager[None]:
    """Return a context in which, if ``enabled``, backward passes do not average gradients over processes."""
    return model.no_sync() if enabled and isinstance(model, DistributedDataParallel) else contextlib.nullcontext()
