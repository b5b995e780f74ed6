"""Measure what computing frozen layers once saves (train.cache_views), and which engine computes them fastest.

    python -m benchmarks.frozen                     # a CPU: ResNet-50 and EfficientNet-Lite0 at 160 px

For each case an epoch without the cache (crops, whole network, backward pass through the trainable layers) and one with
it (stored outputs, trainable layers) over the same images, and the frozen layers alone in PyTorch, torch.compile with
frozen weights, and ONNX Runtime. Prints one JSON line per contender. They take turns; speeds are medians over repeats.
Leave the machine idle.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.embed import Forward, engines
from benchmarks.timing import rate, ratios, report, take_turns
from mrl.config import parse_command_line
from mrl.data.memory import MemoryImages
from mrl.data.transforms import Transform, train_indices
from mrl.distributed import Process
from mrl.engine import good_batch_size
from mrl.matryoshka import nested_cross_entropy
from mrl.model import MatryoshkaClassifier, build_backbone, build_model, freeze
from mrl.training.frozen import CachedImages, TrunkCache, split_frozen

CASES = [
    ("resnet50", "head"),
    ("resnet50", "[layer4]"),
    ("tf_efficientnet_lite0", "[conv_head, bn2]"),
    ("tf_efficientnet_lite0", "[blocks.6, conv_head, bn2]"),
]
NUM_CLASSES = 200


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


@torch.inference_mode()
def all_outputs(forward: Forward, batches: list[Tensor]) -> Tensor:
    return torch.cat([forward(batch) for batch in batches])


def main() -> None:
    """Run from a command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_images", type=int, default=256, help="images per epoch; default: 256")
    parser.add_argument("--batch_size", type=int, default=64, help="images per step; default: 64")
    parser.add_argument("--px", type=int, default=160, help="side of the images in pixels; default: 160")
    parser.add_argument("--repeats", type=int, default=3, help="timed repeats; default: 3")
    args = parser.parse_args()
    process = Process(0, 1, torch.device("cpu"))
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
        about: dict[str, Any] = {"backbone": backbone, "trainable": trainable, "px": args.px}
        with tempfile.TemporaryDirectory() as store:
            cache = TrunkCache(model, config, Path(store), "fp32", process)
            cached = CachedImages(cache, "train", images)
            cached.view(0, args.px)
            without = partial(epoch, model, images, args.batch_size, args.px)
            with_cache = partial(epoch, cache.tail, cached, args.batch_size, args.px)
            timed = take_turns({"without the cache": without, "with the cache": with_cache}, args.repeats)
        for name, own in timed.items():
            speed = ratios("ratio", timed["without the cache"].seconds, own.seconds)
            report("epoch", name=name, images_per_second=rate(own.answer, own), **speed, **about)
        normalized = torch.randn(args.num_images, 3, args.px, args.px).to(memory_format=torch.channels_last)
        batches = list(normalized.split(good_batch_size(process.device)))
        forwards = engines(trunk.eval(), batches[0])
        timed = take_turns({name: partial(all_outputs, each, batches) for name, each in forwards.items()}, args.repeats)
        expected = timed["PyTorch"].answer
        for name, own in timed.items():
            difference = float((own.answer - expected).abs().max() / expected.abs().max())
            speed = ratios("ratio", timed["PyTorch"].seconds, own.seconds) | {"difference": difference}
            report("frozen layers", name=name, images_per_second=rate(args.num_images, own), **speed, **about)


if __name__ == "__main__":
    main()
