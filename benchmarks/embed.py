"""Measure how fast image files become vectors, by engine, with JPEG decoding: what `mrl.embed` and eval.py do.

    python -m benchmarks.embed --images DIR                # a CPU: EfficientNet-Lite0 at 160 px
    python -m benchmarks.embed --images DIR --batch_sizes 16 32 64 256 --workers 0 1 2

Contenders: PyTorch, torch.compile with frozen weights, ONNX Runtime in a plain loop, and `embed_split` with the engine
that it chooses. All decode with the same worker processes. Prints one JSON line each with images/s and the ratio to the
fastest engine's plain loop. Contenders take turns; exports and compilation happen before and do not count.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import rate, ratios, report, take_turns
from mrl.config import images_of_weights
from mrl.data.folder import FolderImages, LeftOut, evaluated_images, find_images
from mrl.data.images import threads_beside
from mrl.data.transforms import eval_indices
from mrl.distributed import Process
from mrl.engine import fast_forward
from mrl.model import ModelInfo, build_backbone, build_model
from mrl.retrieval.embeddings import EmbeddingMetadata, embed_split
from mrl.training.frozen import Trunk

Forward = Callable[[Tensor], Tensor]
CPU = torch.device("cpu")


def engines(trunk: Trunk, images: Tensor) -> dict[str, Forward]:
    """Return each engine, ready to run on batches like ``images``; the last is the one that `fast_forward` chooses."""
    import torch._inductor.config as inductor

    inductor.freezing = True
    found: dict[str, Forward] = {"PyTorch": trunk, "torch.compile, frozen weights": torch.compile(copy.deepcopy(trunk))}
    fast, name = fast_forward(trunk, images)
    with torch.inference_mode():
        for forward in found.values():
            forward(images)
    return found | {name: fast}


@torch.inference_mode()
def plain_loop(images: FolderImages, forward: Forward, batch_size: int) -> Tensor:
    """Return the vectors ``(N, D)`` of all images."""
    return torch.cat([forward(batch) for batch, _ in images.eval_batches(eval_indices(len(images), batch_size))])


def our_pass(images: FolderImages, forward: Forward, batch_size: int, width: int) -> Tensor:
    """Return the same from files that `embed_split` wrote."""
    with tempfile.TemporaryDirectory() as folder:
        about = EmbeddingMetadata("", "", "val", 0, 0, "", False, "")
        place = Path(folder) / "a" / "b" / "val"
        found = embed_split(place, about, images, forward, width, Process(0, 1, CPU), batch_size)
        return torch.from_numpy(found.vectors.copy())


def main() -> None:
    """Run from a command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, metavar="DIR", help="a folder of images, at any depth")
    parser.add_argument("--num_images", type=int, default=256, help="images in a pass; default: 256")
    parser.add_argument("--backbone", default="tf_efficientnet_lite0", help="default: tf_efficientnet_lite0")
    parser.add_argument("--px", type=int, default=160, help="side of the images in pixels; default: 160")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[32], help="default: 32")
    parser.add_argument("--workers", type=int, nargs="+", default=[1], help="decoding processes; default: 1")
    parser.add_argument("--repeats", type=int, default=3, help="timed repeats; default: 3")
    args = parser.parse_args()
    own = images_of_weights(args.backbone, "pretrained")
    resize_px = round(own["eval_resize_px"] * args.px / own["eval_px"])
    scale = own["mean"], own["std"], "apply", own["interpolation"]
    info = ModelInfo(args.backbone, {}, 4, False, (8,), False, (), resize_px, args.px, *scale)
    names = find_images(args.images, LeftOut()) if Path(args.images).is_dir() else []
    paths = [f"{args.images}/{name}" for name in names][: args.num_images]
    if len(paths) < max(args.batch_sizes):
        raise SystemExit(f"error: --images {args.images}: {len(paths)} images; a batch is {max(args.batch_sizes)}")
    model = build_model(build_backbone(args.backbone), 2).to(memory_format=torch.channels_last)
    trunk = Trunk(model.backbone, whole=True).eval()
    for workers in args.workers:
        images = evaluated_images(paths, info, CPU, workers)
        for batch_size in args.batch_sizes:
            [(first, _)] = images.eval_batches([range(batch_size)])  # type: ignore[list-item]
            with threads_beside(workers):  # engines take the threads of their first batch
                forwards = engines(trunk, first)
            runs = {name: partial(plain_loop, images, forward, batch_size) for name, forward in forwards.items()}
            fastest = list(forwards)[-1]
            runs["mrl.embed"] = partial(our_pass, images, forwards[fastest], batch_size, model.width)
            timed = take_turns(runs, args.repeats)
            for name, run in timed.items():
                assert F.cosine_similarity(run.answer, timed["PyTorch"].answer).min() > 0.9999, f"{name}: other vectors"
                about = {"backbone": args.backbone, "px": args.px, "batch_size": batch_size, "workers": workers}
                speed = ratios(f"speed_vs {fastest}", timed[fastest].seconds, run.seconds)
                report("embed", name=name, images_per_second=rate(len(paths), run), **speed, **about)


if __name__ == "__main__":
    main()
