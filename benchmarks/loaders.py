"""How fast images arrive: the memory backend, and the others beside what a user would take instead.

    python -m benchmarks.loaders                                     # memory backend at 64 px
    python -m benchmarks.loaders --images DIR --num_images 1600      # and the others on photographs in DIR

The folder and ffcv backends are measured beside torchvision's default: ImageFolder (PIL), v2 transforms on PIL
images, a DataLoader with the same workers; and beside FFCV's own Loader on the same file. FFCV files hold half of the
images as JPEG as in the paper, or all, or none. Every photograph in DIR is linked as often as it takes to
make up --num_images. Prints one JSON line a contender. The contenders take turns within each repeat,
so that a machine that slows down slows all of them; speeds are medians, ratios medians of the ratios
of each repeat. Leave the machine idle; "load" says whether it was. Processor time per image, of all
processes together, says less about waiting but stays comparable where something else is running.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL
import torch
import torchvision
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from mrl.config import DataConfig
from mrl.data import FolderImages, cores_per_process
from mrl.data.ffcv import FFCVFile, FFCVImages, import_ffcv
from mrl.data.folder import list_images
from mrl.data.memory import MemoryImages
from mrl.data.transforms import Transform, normalize, train_indices
from mrl.data.write_ffcv import Settings, write
from mrl.errors import UserError

Batches = Iterable[tuple[Tensor, Tensor]]
Epoch = Callable[[int], Batches]
DEFAULTS = DataConfig()
JPEG_SHARES = {"50% JPEG": 0.5, "JPEG": 1.0, "raw": 0.0}


def transform_for(px: int) -> Transform:
    """The paper's augmentation."""
    return Transform(0, DEFAULTS.crop_scale, DEFAULTS.crop_ratio, DEFAULTS.flip, px, px, DEFAULTS.mean, DEFAULTS.std)


def memory_epoch(num_images: int, px: int, batch_size: int, device: torch.device) -> Epoch:
    """Batches of random pixels kept in memory; what they show does not change the speed."""
    pixels = torch.randint(0, 256, (num_images, 3, px, px), dtype=torch.uint8)
    images = MemoryImages(pixels, torch.zeros(num_images, dtype=torch.int64), ["a"], transform_for(px), device)
    return lambda epoch: images.train_batches(train_indices(num_images, batch_size, 0, epoch), epoch, px)


def folder_epoch(root: Path, px: int, batch_size: int, num_workers: int, device: torch.device) -> Epoch:
    """Batches by this package's folder backend."""
    found = list_images(root, "train")
    images = FolderImages(found.paths, found.labels, found.classes, transform_for(px), device, num_workers)
    return lambda epoch: images.train_batches(train_indices(len(images), batch_size, 0, epoch), epoch, px)


def torchvision_epoch(root: Path, px: int, batch_size: int, num_workers: int, device: torch.device) -> Epoch:
    """Batches by torchvision's usual recipe."""
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(px, DEFAULTS.crop_scale, DEFAULTS.crop_ratio),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(DEFAULTS.mean), list(DEFAULTS.std)),
        ]
    )
    loader = DataLoader(
        ImageFolder(root / "train", transform),
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
    )
    return lambda epoch: ((images.to(device), labels.to(device)) for images, labels in loader)


def write_ffcv_files(root: Path) -> dict[str, FFCVFile]:
    """FFCV files of the photographs below ``root/train``, one for each of `JPEG_SHARES`."""
    images = list_images(root, "train")
    ffcv_files = {}
    for name, share in JPEG_SHARES.items():
        path = root / f"{share}.beton"
        ffcv_files[name] = FFCVFile(path, write(images, "train", path, Settings(jpeg_share=share), cores_per_process()))
    return ffcv_files


def ffcv_epoch(beton: FFCVFile, px: int, batch_size: int, num_workers: int, device: torch.device) -> Epoch:
    """Batches by this package's ffcv backend."""
    images = FFCVImages(beton, transform_for(px), device, ThreadPoolExecutor(num_workers))
    return lambda epoch: images.train_batches(train_indices(len(images), batch_size, 0, epoch), epoch, px)


def ffcv_loader_epoch(beton: FFCVFile, px: int, batch_size: int, num_workers: int, device: torch.device) -> Epoch:
    """Batches by FFCV's own Loader, normalized in torch as ours are (its own needs cupy on a GPU)."""
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, Squeeze, ToDevice, ToTensor, ToTorchImage

    crop = RandomResizedCropRGBImageDecoder((px, px), DEFAULTS.crop_scale, DEFAULTS.crop_ratio)
    num_threads = torch.get_num_threads()
    loader = Loader(
        str(beton.path),
        batch_size,
        num_workers,
        order=OrderOption.RANDOM,
        drop_last=True,
        pipelines={
            "image": [crop, RandomHorizontalFlip(), ToTensor(), ToDevice(device), ToTorchImage()],
            "label": [IntDecoder(), ToTensor(), Squeeze(), ToDevice(device)],
        },
    )
    torch.set_num_threads(num_threads)  # FFCV sets it
    return lambda epoch: ((normalize(images, DEFAULTS.mean, DEFAULTS.std), labels) for images, labels in loader)


def link_photographs(source: Path, root: Path, num_images: int) -> None:
    """Make ``root/train/all/`` of links to the JPEGs below ``source``, each as often as needed."""
    paths = sorted(path.resolve() for path in source.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not paths:
        raise SystemExit(f"error: {source} holds no .jpg or .jpeg files")
    (root / "train" / "all").mkdir(parents=True)
    for number in range(num_images):
        (root / "train" / "all" / f"{number:07d}.jpg").symlink_to(paths[number % len(paths)])


def cpu_seconds() -> float:
    """Processor time of this process and of the workers that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def measure(epochs: dict[str, Epoch], repeats: int, device: torch.device) -> dict[str, list[tuple[float, float]]]:
    """Images per second and CPU ms per image of each contender, once a repeat, after one that is not counted."""
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in epochs}
    for repeat in range(repeats + 1):
        for name, epoch in epochs.items():
            started, cpu_started = time.perf_counter(), cpu_seconds()
            num_images = sum(len(labels) for _, labels in epoch(repeat))
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat > 0:
                seconds, cpu = time.perf_counter() - started, cpu_seconds() - cpu_started
                measured[name].append((num_images / seconds, 1000 * cpu / num_images))
    return measured


def report(measured: dict[str, list[tuple[float, float]]], baseline: str | None, **about: object) -> None:
    """Print one JSON line for each contender."""
    speeds = {name: [speed for speed, _ in values] for name, values in measured.items()}
    costs = {name: statistics.median(cost for _, cost in values) for name, values in measured.items()}
    for name, values in speeds.items():
        row: dict[str, object] = {"name": name, "images_per_second": round(statistics.median(values), 1)}
        row["images_per_second_range"] = [round(min(values), 1), round(max(values), 1)]
        row["cpu_ms_per_image"] = round(costs[name], 3)
        if baseline is not None:
            ratios = [own / other for own, other in zip(values, speeds[baseline], strict=True)]
            row |= {"ratio": round(statistics.median(ratios), 3), "baseline": baseline}
            row["ratio_range"] = [round(min(ratios), 3), round(max(ratios), 3)]
            row["cpu_ratio"] = round(costs[baseline] / costs[name], 3)
        print(json.dumps(row | about), flush=True)


def cpu_model() -> str:
    """The processor's name, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of photographs (JPEG); without it only the memory backend")
    parser.add_argument("--num_images", type=int, default=1600, help="photographs per epoch, by repetition")
    parser.add_argument(
        "--px", type=int, nargs="+", default=[160, 224], help="side of a crop of a photograph in pixels"
    )
    parser.add_argument("--memory_px", type=int, default=64, help="memory backend: side of images and crops in pixels")
    parser.add_argument("--batch_size", type=int, default=128, help="photographs per batch")
    parser.add_argument("--memory_batch_size", type=int, default=256, help="memory backend: images per batch")
    parser.add_argument("--num_workers", type=int, default=cores_per_process(), help="decoding processes or threads")
    parser.add_argument("--repeats", type=int, default=5, help="counted repeats")
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "cpu": cpu_model(),
        "cores": cores_per_process(),
        "versions": {"torch": torch.__version__, "torchvision": torchvision.__version__, "pillow": PIL.__version__}
        | {"numpy": np.__version__, "python": platform.python_version()},
        "repeats": args.repeats,
    }
    memory = {"memory backend": memory_epoch(20_000, args.memory_px, args.memory_batch_size, device)}
    measured = measure(memory, args.repeats, device)
    shape = {"px": args.memory_px, "batch_size": args.memory_batch_size, "threads": torch.get_num_threads()}
    report(measured, None, **shape, load=round(os.getloadavg()[0], 1), **about)
    if args.images is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        link_photographs(args.images, Path(folder), args.num_images)
        try:
            import_ffcv()
            ffcv_files = write_ffcv_files(Path(folder))
        except UserError as error:
            print(f"without FFCV: {error}", file=sys.stderr)
            ffcv_files = {}
        for px in args.px:
            settings = (px, args.batch_size, args.num_workers, device)
            epochs = {
                "torchvision ImageFolder (PIL)": torchvision_epoch(Path(folder), *settings),
                "folder backend": folder_epoch(Path(folder), *settings),
            }
            epochs |= {f"ffcv backend, {name}": ffcv_epoch(beton, *settings) for name, beton in ffcv_files.items()}
            if ffcv_files:
                epochs["FFCV's Loader, 50% JPEG"] = ffcv_loader_epoch(ffcv_files["50% JPEG"], *settings)
            measured = measure(epochs, args.repeats, device)
            shape = {"px": px, "batch_size": args.batch_size, "workers": args.num_workers}
            report(measured, "torchvision ImageFolder (PIL)", **shape, load=round(os.getloadavg()[0], 1), **about)


if __name__ == "__main__":
    main()
