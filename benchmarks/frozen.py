"""Measure what computing frozen layers once saves (train.cache_views), and which engine computes them fastest.

    python -m benchmarks.frozen                     # a CPU: ResNet-50 and EfficientNet-Lite0 at 160 px

For each case an epoch without the cache (crops, whole network, backward pass through the trainable layers) and one with
it (stored outputs, trainable layers) over the same images, and the frozen layers alone in PyTorch, torch.compile with
frozen weights, and ONNX Runtime. Prints one JSON line per contender. They take turns; speeds are medians over repeats.
Leave the machine idle.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mrl.config import parse_command_line
from mrl.data.memory import MemoryImages
from mrl.data.transforms import Transform, train_indices
from mrl.distributed import Process
from mrl.engine import fast_forward, good_batch_size
from mrl.matryoshka import nested_cross_entropy
from mrl.model import MatryoshkaClassifier, build_backbone, build_model, freeze
from mrl.rundir import provenance
from mrl.training.frozen import Trunk, TrunkCache, split_frozen

CASES = [
    ("resnet50", "head"),
    ("resnet50", "[layer4]"),
    ("tf_efficientnet_lite0", "[conv_head, bn2]"),
    ("tf_efficientnet_lite0", "[blocks.6, conv_head, bn2]"),
]
NUM_CLASSES = 200


def timed(contenders: dict[str, Callable[[], int]], repeats: int) -> dict[str, float]:
    """Return the median images/s of each contender after a first call that does not count."""
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(repeats + 1):
        for name, run in contenders.items():
            start = time.perf_counter()
            num_images = run()
            if repeat:
                speeds[name].append(num_images / (time.perf_counter() - start))
    return {name: statistics.median(found) for name, found in speeds.items()}


def epoch(model: MatryoshkaClassifier, images: Any, batch_size: int, px: int) -> int:
    """Train ``model`` for one epoch as train.py does; return the number of images."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01, momentum=0.9)
    model.train()
    indices = train_indices(len(images), batch_size, 0, 0)
    for inputs, labels in images.train_batches(indices, 0, px):
        nested_cross_entropy(model(inputs), labels, 0.1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return len(indices) * batch_size


def engines(trunk: Trunk, images: Tensor, repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    """Return images/s of each engine, and the largest difference from PyTorch relative to the largest value."""
    import torch._inductor.config as inductor

    inductor.freezing = True
    forwards: dict[str, Callable[[Tensor], Tensor]] = {"PyTorch": trunk}
    fast, name = fast_forward(trunk, images[:2])
    forwards |= {name: fast, "torch.compile, frozen weights": torch.compile(copy.deepcopy(trunk))}
    batches = images.to(memory_format=torch.channels_last).split(good_batch_size(images.device))
    with torch.inference_mode():
        expected = trunk(batches[0])
        differences = {
            name: float((forward(batches[0]) - expected).abs().max() / expected.abs().max())
            for name, forward in forwards.items()
        }

        def run(forward: Callable[[Tensor], Tensor]) -> int:
            for batch in batches:
                forward(batch)
            return len(images)

        speeds = timed({name: partial(run, forward) for name, forward in forwards.items()}, repeats)
    return speeds, differences


def main() -> None:
    """Run from a command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_images", type=int, default=256, help="images per epoch; default: 256")
    parser.add_argument("--batch_size", type=int, default=64, help="images per step; default: 64")
    parser.add_argument("--px", type=int, default=160, help="side of the images in pixels; default: 160")
    parser.add_argument("--repeats", type=int, default=3, help="timed repeats; default: 3")
    args = parser.parse_args()
    process = Process(0, 1, torch.device("cpu"))
    about = {key: provenance(1)[key] for key in ("cpu", "torch", "git_commit")} | {"threads": torch.get_num_threads()}
    print(json.dumps(about))
    pixels = torch.randint(0, 256, (args.num_images, 3, args.px, args.px), dtype=torch.uint8)
    labels = torch.arange(args.num_images) % NUM_CLASSES
    for backbone, trainable in CASES:
        argv = ["--model.trainable", trainable, "--train.cache_views", "1", "--train.precision", "fp32"]
        argv += ["--data.eval_px", str(args.px), "--data.eval_resize_px", str(args.px), "--data.train_px", str(args.px)]
        config = parse_command_line(argv, "")
        data = config.data
        transform = Transform(0, data.crop_scale, data.crop_ratio, True, args.px, args.px, data.mean, data.std)
        images = MemoryImages(pixels, labels, [str(i) for i in range(NUM_CLASSES)], transform, process.device)
        model = build_model(build_backbone(backbone), NUM_CLASSES)
        freeze(model, config.model.trainable)
        model.to(memory_format=torch.channels_last)
        trunk, _ = split_frozen(model, args.px)
        with tempfile.TemporaryDirectory() as store:
            cache = TrunkCache(model, config, Path(store), "fp32", process)
            cached = cache.images("train", images)
            cached.view(0, args.px)
            speeds = timed(
                {
                    "without": partial(epoch, model, images, args.batch_size, args.px),
                    "with": partial(epoch, cache.tail, cached, args.batch_size, args.px),
                },
                args.repeats,
            )
        for name, speed in speeds.items():
            line: dict[str, Any] = {"backbone": backbone, "trainable": trainable, "epoch": f"{name} the cache"}
            line |= {"images_per_second": round(speed, 1), "ratio": round(speed / speeds["without"], 2)}
            print(json.dumps(line), flush=True)
        normalized = torch.randn(args.num_images, 3, args.px, args.px)
        found, differences = engines(trunk, normalized, args.repeats)
        for name, speed in found.items():
            line = {"backbone": backbone, "in front of": trainable, "engine": name}
            line |= {"images_per_second": round(speed, 1), "ratio": round(speed / found["PyTorch"], 2)}
            print(json.dumps(line | {"difference": float(f"{differences[name]:.1e}")}), flush=True)


if __name__ == "__main__":
    main()
