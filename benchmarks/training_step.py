"""What nesting costs: a whole training step of MRL, MRL-E and the plain classifier, and their heads alone.

    python -m benchmarks.training_step                       # ResNet-50 at 64 px, 1000 classes
    python -m benchmarks.training_step --batch_size 512 --px 160 --repeats 20       # on a GPU

Prints one JSON line a measurement. The contenders take turns within each repeat, so that a machine
that slows down slows all of them; ratios are medians of the ratios of each repeat.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from torch import nn

from mrl import NestedLinear, nested_cross_entropy
from mrl.backbones import build_backbone
from mrl.models import build_model
from mrl.nesting import default_nesting_list
from mrl.training.optimizer import build_optimizer

Step = Callable[[], None]


def training_step(dims: tuple[int, ...], tied: bool, args: argparse.Namespace, device: torch.device) -> Step:
    """One step as train.py takes it: bf16 autocast, channels_last, SGD."""
    torch.manual_seed(0)
    model = build_model(build_backbone(args.backbone), args.num_classes, dims, tied)
    model.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = build_optimizer(model, "sgd", 0.1, 0.9, 1e-4)
    images = torch.randn(args.batch_size, 3, args.px, args.px, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(args.num_classes, (args.batch_size,), device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            losses = nested_cross_entropy(model(images), labels, 0.1)
        losses.sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def plain_timm_step(args: argparse.Namespace, device: torch.device) -> Step:
    """What a user would write without this package: timm's own classifier, torch's cross-entropy."""
    torch.manual_seed(0)
    model = timm.create_model(args.backbone, num_classes=args.num_classes)
    model.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    images = torch.randn(args.batch_size, 3, args.px, args.px, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(args.num_classes, (args.batch_size,), device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = F.cross_entropy(model(images), labels, label_smoothing=0.1)
        loss.backward()
        optimizer.step()
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="resnet50", help="timm model name")
    parser.add_argument("--px", type=int, default=64, help="image side in pixels")
    parser.add_argument("--batch_size", type=int, default=64, help="images per training step")
    parser.add_argument("--head_batch_size", type=int, default=1024, help="embeddings per step of the head alone")
    parser.add_argument("--num_classes", type=int, default=1000, help="number of classes")
    parser.add_argument("--repeats", type=int, default=10, help="counted repeats")
    parser.add_argument("--inner", type=int, default=3, help="steps per repeat and contender")
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    width: int = timm.create_model(args.backbone, num_classes=0).head_hidden_size  # type: ignore[assignment]
    dims = default_nesting_list(width)
    contenders = {"plain": ((width,), False), "MRL": (dims, False), "MRL-E": (dims, True)}
    about = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 1),
        "repeats": args.repeats,
    }
    whole = {name: training_step(*what, args, device) for name, what in contenders.items()}
    whole["plain timm"] = plain_timm_step(args, device)
    heads = {name: head_step(*what, args, device) for name, what in contenders.items()}
    for title, steps, images in (
        ("training step", whole, args.batch_size),
        ("head + loss", heads, args.head_batch_size),
    ):
        seconds = measure(steps, args.repeats, args.inner, device)
        for name, values in seconds.items():
            ratios = [plain / own for plain, own in zip(seconds["plain"], values, strict=True)]
            row = {
                "measurement": title,
                "name": name,
                "images_per_second": round(images / statistics.median(values), 1),
                "speed_vs_plain": round(statistics.median(ratios), 3),
                "speed_vs_plain_range": [round(min(ratios), 3), round(max(ratios), 3)],
                "batch_size": images,
                "px": args.px if title == "training step" else None,
            }
            print(json.dumps(row | about), flush=True)


if __name__ == "__main__":
    main()
