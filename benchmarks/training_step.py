"""The cost of nesting: a training step of MRL, MRL-E and the plain classifier, and their heads alone.

    python -m benchmarks.training_step                       # ResNet-50 at 64 px, 1000 classes, on a CPU
    python -m benchmarks.training_step --blurpool --px 160 --batch_sizes 256 512 1024 --precisions bf16 fp16 \\
        --modes eager compiled --repeats 20 --inner 10       # on a GPU

Prints one JSON line per measurement. Beside them: timm's own classifier in a plain loop ("plain timm"), and MRL in the
manner of the authors' loop ("authors' loop"; always eager, and always fp16 on a GPU). The contenders take turns within
each repeat, so that a slow moment of the machine affects all of them; ratios are medians of the ratios of each repeat.
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


def amp_step(model: nn.Module, optimizer: torch.optim.Optimizer, dtype: torch.dtype, loss: Callable) -> Step:
    """Return a training step with mixed precision; ``loss()`` returns the scalar loss."""
    [device] = {parameter.device for parameter in model.parameters()}
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def step() -> None:
        with torch.autocast(device.type, dtype):
            scalar = loss()
        scaler.scale(scalar).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step


def contenders(
    args: argparse.Namespace, dims: tuple[int, ...], images: Tensor, labels: Tensor, precision: str, mode: str
) -> dict[str, Callable[[], Step]]:
    """Return a function per contender that builds it and returns its training step."""
    dtype = DTYPES[precision]

    def prepare(model: nn.Module) -> None:
        model.to(images.device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        if mode == "compiled":
            model.compile()

    def ours(dims: tuple[int, ...], tied: bool) -> Step:
        backbone = build_backbone(args.backbone, blurpool=args.blurpool)
        model = build_model(backbone, args.num_classes, dims, tied)
        prepare(model)
        weights, sums = torch.ones(len(dims), device=images.device), MetricAccumulator(dims, images.device)

        def loss() -> Tensor:
            logits = model(images)
            losses = nested_cross_entropy(logits, labels, 0.1)
            sums.add(logits, labels, losses)
            return (weights * losses).sum()

        return amp_step(model, build_optimizer(model, "sgd", 0.1, 0.9, 1e-4), dtype, loss)

    def plain_timm() -> Step:
        model = timm.create_model(args.backbone, num_classes=args.num_classes)
        prepare(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        return amp_step(model, optimizer, dtype, lambda: F.cross_entropy(model(images), labels, label_smoothing=0.1))

    def authors() -> Step:
        model = build_authors_model(args.backbone, dims, args.num_classes, args.blurpool)
        return authors_step(model, images, labels, torch.float16 if images.is_cuda else dtype)

    return {
        "plain": partial(ours, dims[-1:], False),
        "MRL": partial(ours, dims, False),
        "MRL-E": partial(ours, dims, True),
        "plain timm": plain_timm,
        AUTHORS: authors,
    }


def head_step(dims: tuple[int, ...], tied: bool, args: argparse.Namespace, device: torch.device) -> Step:
    """Return a forward and backward pass of the head and its loss alone, in float32."""
    head = NestedLinear(dims, args.num_classes, tied).to(device)
    z = torch.randn(args.head_batch_size, dims[-1], device=device, requires_grad=True)
    labels = torch.randint(args.num_classes, (args.head_batch_size,), device=device)

    def step() -> None:
        nested_cross_entropy(head(z), labels, 0.1).sum().backward()
        head.zero_grad()
        z.grad = None

    return step


def peak_memory(build: Callable[[], Step], device: torch.device) -> tuple[Step, int | None]:
    """Return a contender after its first steps, and the GPU memory in MiB that it and one later step take."""
    torch.manual_seed(0)
    if device.type != "cuda":
        return build(), None
    before = torch.cuda.memory_allocated()
    step = build()
    for _ in range(3):  # the first steps try out kernels
        step()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return step, round((torch.cuda.max_memory_allocated() - before) / 2**20)


def measure(steps: dict[str, Step], repeats: int, inner: int, device: torch.device) -> dict[str, list[float]]:
    """Return the seconds per step of each contender, one value per repeat, after one that is not counted."""
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


def print_rows(seconds: dict[str, list[float]], memory: dict[str, int | None], about: dict[str, Any]) -> None:
    """Print one JSON line per contender, compared with the plain classifier and the authors' loop."""
    for name, values in seconds.items():
        images_per_second = about["batch_size"] / statistics.median(values)
        row: dict[str, Any] = {"name": name, "images_per_second": round(images_per_second, 1)}
        for key, other in (("speed_vs_plain", "plain"), ("speed_vs_authors", AUTHORS)):
            if other in seconds:
                ratios = [theirs / own for theirs, own in zip(seconds[other], values, strict=True)]
                row[key] = round(statistics.median(ratios), 3)
                row[f"{key}_range"] = [round(min(ratios), 3), round(max(ratios), 3)]
        row |= {"peak_memory_mib": memory.get(name)} | about
        if name == AUTHORS:
            row |= {"mode": "eager", "precision": "fp16" if about["cuda"] else about["precision"]}
        print(json.dumps(row), flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--backbone", default="resnet50", help="timm ResNet")
    add("--blurpool", action="store_true", help="blur before strided convolutions (not in plain timm)")
    add("--px", type=int, default=64, help="image side in pixels")
    add("--batch_sizes", type=int, nargs="+", default=[64], help="images per training step")
    add("--precisions", nargs="+", default=["bf16"], choices=list(DTYPES), help="of autocast")
    add("--modes", nargs="+", default=["eager"], choices=["eager", "compiled"], help="with or without torch.compile")
    add("--head_batch_size", type=int, default=1024, help="embeddings per step of the head alone")
    add("--num_classes", type=int, default=1000, help="number of classes")
    add("--repeats", type=int, default=10, help="counted repeats")
    add("--inner", type=int, default=3, help="steps per repeat and contender")
    args = parser.parse_args(argv)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True  # this and the next line as in train.py
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
        torch.compiler.reset()  # torch stops compiling after some models of one class
        images = torch.randn(batch_size, 3, args.px, args.px, device=device).to(memory_format=torch.channels_last)
        labels = torch.randint(args.num_classes, (batch_size,), device=device)
        steps, memory = {}, {}
        for name, build in contenders(args, dims, images, labels, precision, mode).items():
            try:
                steps[name], memory[name] = peak_memory(build, device)
            except torch.cuda.OutOfMemoryError:
                print(f"{name} with batch size {batch_size} in {precision} exceeds the GPU memory", file=sys.stderr)
        settings = {"measurement": "training step", "batch_size": batch_size, "px": args.px, "precision": precision}
        seconds = measure(steps, args.repeats, args.inner, device)
        print_rows(seconds, memory, settings | {"mode": mode, "blurpool": args.blurpool} | about)
    kinds = {"plain": (dims[-1:], False), "MRL": (dims, False), "MRL-E": (dims, True)}
    heads = {name: head_step(*kind, args, device) for name, kind in kinds.items()}
    settings = {"measurement": "head + loss", "batch_size": args.head_batch_size, "precision": "fp32"}
    print_rows(measure(heads, args.repeats, args.inner, device), {}, settings | about)


if __name__ == "__main__":
    main()
