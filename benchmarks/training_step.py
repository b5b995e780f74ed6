"""The cost of nesting: a training step of MRL, MRL-E and the plain classifier, and their heads alone.

    python -m benchmarks.training_step                       # ResNet-50 at 64 px, 1000 classes, on a CPU
    python -m benchmarks.training_step --blurpool --px 160 --batch_sizes 256 512 1024 --precisions bf16 fp16 \\
        --modes eager compiled --repeats 20 --inner 10       # on a GPU

Prints one JSON line per measurement. Beside them: timm's own classifier in a plain loop ("plain timm"), and MRL in the
manner of the authors' loop ("authors' loop"; always eager, and always fp16 on a GPU). Contenders take turns; ratios are
medians of the ratios of each repeat.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.authors_loop import authors_step, build_authors_model
from benchmarks.timing import rate, ratios, report, take_turns
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
    device = next(model.parameters()).device.type
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)

    def step() -> None:
        with torch.autocast(device, dtype):
            scalar = loss()
        scaler.scale(scalar).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step


def contenders(
    args: argparse.Namespace, dims: tuple[int, ...], images: Tensor, labels: Tensor, dtype: torch.dtype, mode: str
) -> dict[str, Callable[[], Step]]:
    """Return a function per contender that builds it and returns its training step."""

    def prepare(model: nn.Module) -> None:
        model.to(images.device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        if mode == "compiled":
            model.compile()

    def ours(dims: tuple[int, ...], tied: bool) -> Step:
        model = build_model(build_backbone(args.backbone, blurpool=args.blurpool), args.num_classes, dims, tied)
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

    kinds = {name: partial(ours, *kind) for name, kind in kinds_of(dims).items()}
    return {**kinds, "plain timm": plain_timm, AUTHORS: authors}


def kinds_of(dims: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Return nesting list and ``tied`` of each kind of head."""
    return {"plain": (dims[-1:], False), "MRL": (dims, False), "MRL-E": (dims, True)}


def head_step(args: argparse.Namespace, device: torch.device, dims: tuple[int, ...], tied: bool) -> Step:
    """Return a forward and backward pass of the head and its loss alone, in float32."""
    head = NestedLinear(dims, args.num_classes, tied).to(device)
    z = torch.randn(args.head_batch_size, dims[-1], device=device, requires_grad=True)
    labels = torch.randint(args.num_classes, (args.head_batch_size,), device=device)

    def step() -> None:
        nested_cross_entropy(head(z), labels, 0.1).sum().backward()
        head.zero_grad()
        z.grad = None

    return step


def peak_memory(build: Callable[[], Step]) -> tuple[Step, int | None]:
    """Return a contender after its first steps, and the GPU memory in MiB that it and one later step take."""
    torch.manual_seed(0)
    if not torch.cuda.is_available():
        return build(), None
    before = torch.cuda.memory_allocated()
    step = build()
    for _ in range(3):  # the first steps try out kernels
        step()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return step, round((torch.cuda.max_memory_allocated() - before) / 2**20)


def compare(args: argparse.Namespace, steps: dict[str, Step], memory: dict[str, int | None], **about: Any) -> None:
    """Time the steps, and report each beside the plain classifier and the authors' loop."""
    timed = take_turns(steps, args.repeats, args.inner) if steps else {}
    for name, own in timed.items():
        line = about | {"images_per_second": rate(about["batch_size"], own), "peak_memory_mib": memory.get(name)}
        for key, other in (("plain", "plain"), ("authors", AUTHORS)):
            if other in timed:
                line |= ratios(f"speed_vs_{key}", timed[other].seconds, own.seconds)
        line |= {"precision": "fp16"} if name == AUTHORS and torch.cuda.is_available() else {}
        report(name=name, backbone=args.backbone, repeats=args.repeats, **line)


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
    for precision, mode, batch_size in itertools.product(args.precisions, args.modes, args.batch_sizes):
        torch.compiler.reset()  # torch stops compiling after some models of one class
        images = torch.randn(batch_size, 3, args.px, args.px, device=device).to(memory_format=torch.channels_last)
        labels = torch.randint(args.num_classes, (batch_size,), device=device)
        steps, memory = {}, {}
        for name, build in contenders(args, dims, images, labels, DTYPES[precision], mode).items():
            try:
                steps[name], memory[name] = peak_memory(build)
            except torch.cuda.OutOfMemoryError:
                print(f"{name} with batch size {batch_size} in {precision} exceeds the GPU memory", file=sys.stderr)
        about = {"batch_size": batch_size, "px": args.px, "precision": precision, "mode": mode}
        compare(args, steps, memory, measurement="training step", blurpool=args.blurpool, **about)
    heads = {name: head_step(args, device, *kind) for name, kind in kinds_of(dims).items()}
    compare(args, heads, {}, measurement="head + loss", batch_size=args.head_batch_size, precision="fp32")


if __name__ == "__main__":
    main()
