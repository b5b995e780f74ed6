"""Measure how fast images arrive: our backends beside torchvision's ImageFolder and FFCV's own Loader.

    python -m benchmarks.loaders                                     # memory backend at 64 px
    python -m benchmarks.loaders --images DIR --num_images 1600      # and the others on photographs in DIR

The baseline of the folder and ffcv backends is torchvision's usual recipe: ImageFolder (PIL), v2 transforms, and a
DataLoader with as many workers. FFCV files hold half of the images as JPEG as in the paper, or all, or none. Each
photograph in DIR is linked as often as --num_images needs. Prints one JSON line per contender. Contenders take turns;
speeds are medians, ratios medians of the ratios of each repeat. Leave the machine idle ("load" shows whether it was);
CPU time per image, of all processes together, stays comparable if it was not.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from benchmarks.timing import rate, ratios, report, take_turns
from mrl.config import DataConfig
from mrl.data import FolderImages, cores_per_process
from mrl.data.ffcv import FFCVFile, FFCVImages, import_ffcv
from mrl.data.folder import list_images
from mrl.data.images import Images
from mrl.data.memory import MemoryImages
from mrl.data.transforms import Transform, normalize, train_indices
from mrl.data.write_ffcv import Settings, write
from mrl.errors import UserError

CONFIG = DataConfig()
CROP = (CONFIG.crop_scale, CONFIG.crop_ratio)
BASELINE = "torchvision ImageFolder (PIL)"
JPEG_SHARES = {"50% JPEG": 0.5, "JPEG": 1.0, "raw": 0.0}


def our_epochs(images: Images, batch_size: int, px: int) -> Callable[[], int]:
    """Return a function that reads an epoch, each time the next one, and returns the number of images."""
    epochs = itertools.count()

    def read() -> int:
        indices = train_indices(len(images), batch_size, 0, epoch := next(epochs))
        return sum(len(labels) for _, labels in images.train_batches(indices, epoch, px))

    return read


def their_epochs(loader: Iterable, device: torch.device) -> Callable[[], int]:
    """Return the same of another library's loader; uint8 images are normalized as ours are."""

    def on_device(images: Tensor) -> Tensor:
        images = images.to(device)
        return normalize(images, CONFIG.mean, CONFIG.std) if images.dtype == torch.uint8 else images

    return lambda: sum(len(on_device(images)) for images, _ in loader)


def torchvision_loader(root: Path, px: int, batch_size: int, num_workers: int) -> DataLoader:
    """Return torchvision's usual recipe."""
    steps = [v2.RandomResizedCrop(px, *CROP), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(CONFIG.mean), list(CONFIG.std))]
    images = ImageFolder(root / "train", v2.Compose(steps))
    settings = {"num_workers": num_workers, "pin_memory": torch.cuda.is_available()}
    return DataLoader(images, batch_size, shuffle=True, drop_last=True, **settings)  # type: ignore[arg-type]


def ffcv_loader(path: Path, px: int, batch_size: int, num_workers: int, device: torch.device) -> Iterable:
    """Return FFCV's own Loader, without normalization, which needs cupy on a GPU."""
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, Squeeze, ToDevice, ToTensor, ToTorchImage

    crop = RandomResizedCropRGBImageDecoder((px, px), *CROP)
    pipelines = {
        "image": [crop, RandomHorizontalFlip(), ToTensor(), ToDevice(device), ToTorchImage()],
        "label": [IntDecoder(), ToTensor(), Squeeze(), ToDevice(device)],
    }
    num_threads = torch.get_num_threads()
    loader = Loader(str(path), batch_size, num_workers, order=OrderOption.RANDOM, drop_last=True, pipelines=pipelines)
    torch.set_num_threads(num_threads)  # FFCV sets it
    return loader


def link_photographs(source: Path, root: Path, num_images: int) -> None:
    """Make ``root/train/all/`` of links to the JPEGs below ``source``, each as often as needed."""
    paths = sorted(path.resolve() for path in source.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not paths:
        raise SystemExit(f"error: {source} holds no .jpg or .jpeg files")
    (root / "train" / "all").mkdir(parents=True)
    for number in range(num_images):
        (root / "train" / "all" / f"{number:07d}.jpg").symlink_to(paths[number % len(paths)])


def measure(epochs: dict[str, Callable[[], int]], repeats: int, **about: Any) -> None:
    """Report images per second, CPU ms per image, and their ratios to the baseline."""
    timed = take_turns(epochs, repeats)
    for name, own in timed.items():
        line: dict[str, Any] = {"images_per_second": rate(own.answer, own)}
        line["cpu_ms_per_image"] = round(1000 * statistics.median(own.cpu_seconds) / own.answer, 3)
        if base := timed.get(BASELINE):
            line |= ratios("speed_vs_torchvision", base.seconds, own.seconds)
            line |= ratios("cpu_vs_torchvision", own.cpu_seconds, base.cpu_seconds)
        report("loader", name=name, **line, repeats=repeats, **about)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of photographs (JPEG); without it only the memory backend")
    parser.add_argument("--num_images", type=int, default=1600, help="photographs per epoch, by repetition")
    parser.add_argument("--px", type=int, nargs="+", default=[160, 224], help="sides of a photograph's crop in pixels")
    parser.add_argument("--memory_px", type=int, default=64, help="memory backend: side of images and crops in pixels")
    parser.add_argument("--batch_size", type=int, default=128, help="photographs per batch")
    parser.add_argument("--memory_batch_size", type=int, default=256, help="memory backend: images per batch")
    parser.add_argument("--num_workers", type=int, default=cores_per_process(), help="decoding processes or threads")
    parser.add_argument("--repeats", type=int, default=5, help="counted repeats")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    px, batch_size, num_workers = args.memory_px, args.memory_batch_size, args.num_workers
    transform = Transform(0, *CROP, CONFIG.flip, px, px, CONFIG.mean, CONFIG.std)
    pixels = torch.randint(0, 256, (20_000, 3, px, px), dtype=torch.uint8)
    memory = MemoryImages(pixels, torch.zeros(len(pixels), dtype=torch.int64), ["a"], transform, device)
    measure({"memory backend": our_epochs(memory, batch_size, px)}, args.repeats, px=px, batch_size=batch_size)
    if args.images is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        root, batch_size = Path(folder), args.batch_size
        link_photographs(args.images, root, args.num_images)
        listed = list_images(root, "train")
        files: dict[str, FFCVFile] = {}
        try:
            import_ffcv()
            for name, share in JPEG_SHARES.items():
                files[name] = write(listed, "train", root / f"{share}.beton", Settings(jpeg_share=share), num_workers)
        except UserError as error:
            print(f"without FFCV: {error}")
        for px in args.px:
            theirs = torchvision_loader(root, px, batch_size, num_workers)
            ours: dict[str, Images] = {"folder backend": FolderImages(listed, transform, device, num_workers)}
            ours |= {
                f"ffcv backend, {name}": FFCVImages(file, transform, device, num_workers)
                for name, file in files.items()
            }
            epochs = {BASELINE: their_epochs(theirs, device)}
            epochs |= {name: our_epochs(images, batch_size, px) for name, images in ours.items()}
            if files:
                loader = ffcv_loader(files["50% JPEG"].path, px, batch_size, num_workers, device)
                epochs["FFCV's Loader, 50% JPEG"] = their_epochs(loader, device)
            measure(epochs, args.repeats, px=px, batch_size=batch_size, workers=num_workers)


if __name__ == "__main__":
    main()
