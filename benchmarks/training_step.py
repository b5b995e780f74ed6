"""What nesting costs: a whole training step of MRL, MRL-E and the plain classifier, and their heads alone.

    python -m benchmarks.training_step                       # ResNet-50 at 64 px, 1000 classes, on a CPU
    python -m benchmarks.training_step --blurpool --px 160 --batch_sizes 256 512 1024 --precisions bf16 fp16 \\
        --modes eager compiled --repeats 20 --inner 10       # on a GPU

Prints one JSON line a measurement. Beside them: timm's own classifier in a plain loop ("plain timm"), and MRL in the
manner of the authors' loop ("authors' loop", always eager, and always fp16 on a GPU). The contenders take turns within
each repeat, so that a machine that slows down slows all of them; ratios are medians of the ratios of each repeat.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.authors_loop import authors_step, build_authors_model
from mrl import NestedLinear, nested_cross_entropy
from mrl.matryoshka import default_nesting_list
from mrl.model import build_backbone, build_model
from mrl.training.logging import MetricAccumulator
from mrl.training.optim import build_optimizer

Step = Callable[[], None]
AUTHORS = "authors' loop"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def training_step(
    dims: tuple[int, ...], tied: bool, args: argparse.Namespace, batch: tuple[Tensor, Tensor], precision: str, mode: str
) -> Step:
    """One step as train.py takes it, its sums included: autocast, channels_last, SGD."""
    images, labels = batch
    device = images.device
    torch.manual_seed(0)
    model = build_model(build_backbone(args.backbone, blurpool=args.blurpool), args.num_classes, dims, tied)
    model.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    if mode == "compiled":
        model.compile()
    optimizer = build_optimizer(model, "sgd", 0.1, 0.9, 1e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    weights = torch.ones(len(dims), device=device)
    sums = MetricAccumulator(dims, device)

    def step() -> None:
        with torch.autocast(device.type, DTYPES[precision]):
            logits = model(images)
            losses = nested_cross_entropy(logits, labels, 0.1)
        sums.add(logits, labels, losses)
        scaler.scale((weights * losses).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step


def plain_timm_step(args: argparse.Namespace, batch: tuple[Tensor, Tensor], precision: str, mode: str) -> Step:
    """What a user would write without this package: timm's own classifier, torch's cross-entropy."""
    images, labels = batch
    torch.manual_seed(0)
    model = timm.create_model(args.backbone, num_classes=args.num_classes)
    model.to(images.device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    if mode == "compiled":
        model.compile()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    scaler = torch.amp.GradScaler(images.device.type, enabled=precision == "fp16")

    def step() -> None:
        with torch.autocast(images.device.type, DTYPES[precision]):
            loss = F.cross_entropy(model(images), labels, label_smoothing=0.1)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step


def head_step(dims: tuple[int, ...], tied: bool, args: argparse.Namespace, device: torch.device) -> Step:
    """The head and its loss alone, forward and backward, in float32."""
    head: nn.Module = NestedLinear(dims, args.num_classes, tied).to(device)
    z = torch.randn(args.head_batch_size, dims[-1], device=device, requires_grad=True)
    labels = torch.randint(args.num_classes, (args.head_batch_size,), device=device)

    def step() -> None:
        nested_cross_entropy(head(z), labels, 0.1).sum().backward()
        head.zero_grad()
        z.grad = None

    return step


def measure(steps: dict[str, Step], repeats: int, inner: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds per step of each contender, one value a repeat, after one repeat that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            for _ in range(inner):
                step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat > 0:
                seconds[name].append((time.perf_counter() - started) / inner)
    return seconds


def build_and_weigh(build: Callable[[], Step], device: torch.device) -> tuple[Step, float | None]:
    """A contender after its first steps, and the most GPU memory that it and one step take, in MiB.

    Without those that were built before it, and without the first steps, which try out kernels.
    """
    if device.type != "cuda":
        return build(), None
    before = torch.cuda.memory_allocated()
    step = build()
    for _ in range(3):
        step()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return step, round((torch.cuda.max_memory_allocated() - before) / 2**20)


def print_rows(
    seconds: dict[str, list[float]], memory: dict[str, float | None], num_images: int, about: dict[str, Any]
) -> None:
    """One JSON line for each contender, compared with those two that there is most to learn from."""
    for name, values in seconds.items():
        row: dict[str, Any] = {"name": name, "images_per_second": round(num_images / statistics.median(values), 1)}
        for key, other in (("speed_vs_plain", "plain"), ("speed_vs_authors", AUTHORS)):
            if other in seconds:
                ratios = [theirs / own for theirs, own in zip(seconds[other], values, strict=True)]
                row[key] = round(statistics.median(ratios), 3)
                row[f"{key}_range"] = [round(min(ratios), 3), round(max(ratios), 3)]
        row |= {"peak_memory_mib": memory.get(name), "batch_size": num_images} | about
        if name == AUTHORS:
            row |= {"mode": "eager", "precision": "fp16" if about["cuda"] else about["precision"]}
        print(json.dumps(row), flush=True)


def contenders(
    args: argparse.Namespace, dims: tuple[int, ...], batch: tuple[Tensor, Tensor], precision: str, mode: str
) -> dict[str, Callable[[], Step]]:
    """What builds each contender."""

    def authors() -> Step:
        torch.manual_seed(0)
        model = build_authors_model(args.backbone, dims, args.num_classes, args.blurpool)
        return authors_step(model, *batch, DTYPES["fp16" if batch[0].is_cuda else precision])

    ours = partial(training_step, args=args, batch=batch, precision=precision, mode=mode)
    return {
        "plain": partial(ours, dims[-1:], False),
        "MRL": partial(ours, dims, False),
        "MRL-E": partial(ours, dims, True),
        "plain timm": partial(plain_timm_step, args, batch, precision, mode),
        AUTHORS: authors,
    }


def measure_training(
    args: argparse.Namespace, dims: tuple[int, ...], device: torch.device, precision: str, mode: str, batch_size: int
) -> tuple[dict[str, list[float]], dict[str, float | None]]:
    """Seconds per step and peak memory of each contender that fits into memory."""
    torch.compiler.reset()  # else torch gives up compiling after some models of one class
    images = torch.randn(batch_size, 3, args.px, args.px, device=device).to(memory_format=torch.channels_last)
    batch = images, torch.randint(args.num_classes, (batch_size,), device=device)
    steps: dict[str, Step] = {}
    memory: dict[str, float | None] = {}
    for name, build in contenders(args, dims, batch, precision, mode).items():
        try:
            steps[name], memory[name] = build_and_weigh(build, device)
        except torch.cuda.OutOfMemoryError:
            print(f"{name} of batch size {batch_size} in {precision} does not fit into GPU memory", file=sys.stderr)
    return measure(steps, args.repeats, args.inner, device), memory


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="resnet50", help="timm ResNet")
    parser.add_argument("--blurpool", action="store_true", help="blur before strided convolutions (not in plain timm)")
    parser.add_argument("--px", type=int, default=64, help="image side in pixels")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[64], help="images per training step")
    parser.add_argument("--precisions", nargs="+", default=["bf16"], choices=list(DTYPES), help="autocast to these")
    parser.add_argument("--modes", nargs="+", default=["eager"], choices=["eager", "compiled"], help="torch.compile?")
    parser.add_argument("--head_batch_size", type=int, default=1024, help="embeddings per step of the head alone")
    parser.add_argument("--num_classes", type=int, default=1000, help="number of classes")
    parser.add_argument("--repeats", type=int, default=10, help="counted repeats")
    parser.add_argument("--inner", type=int, default=3, help="steps per repeat and contender")
    args = parser.parse_args(argv)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True  # this and the next as train.py
    torch.set_float32_matmul_precision("high")
    width: int = timm.create_model(args.backbone, num_classes=0).head_hidden_size  # type: ignore[assignment]
    dims = default_nesting_list(width)
    about = {
        "backbone": args.backbone,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "timm": timm.__version__,
        "load": round(os.getloadavg()[0], 1),
        "repeats": args.repeats,
    }
    for precision, mode, batch_size in itertools.product(args.precisions, args.modes, args.batch_sizes):
        found = measure_training(args, dims, device, precision, mode, batch_size)
        settings = {"measurement": "training step", "px": args.px, "precision": precision, "mode": mode}
        print_rows(*found, batch_size, settings | {"blurpool": args.blurpool} | about)
    what = {"plain": ((width,), False), "MRL": (dims, False), "MRL-E": (dims, True)}
    heads = {name: head_step(*which, args, device) for name, which in what.items()}
    seconds = measure(heads, args.repeats, args.inner, device)
    print_rows(seconds, {}, args.head_batch_size, {"measurement": "head + loss", "precision": "fp32"} | about)


if __name__ == "__main__":
    main()
