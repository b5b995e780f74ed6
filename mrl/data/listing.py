"""The image files of a split, found once: the list is kept, and used again while the folders are the same."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mrl.errors import UserError
from mrl.files import write_text
from mrl.progress import progress

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
MAX_SHOWN = 5
CACHE_FORMAT = 1
SETTLED_SECONDS = 2.0


class ImageList(NamedTuple):
    """The images of a split.

    Attributes:
        paths: N files, by class, then by path.
        labels: ``(N,)`` int64, positions in ``classes``.
        classes: Names of the class folders, sorted.
        num_ignored: Files inside class folders that are no images by their extension.
    """

    paths: list[str]
    labels: Tensor
    classes: list[str]
    num_ignored: int


class Folder(NamedTuple):
    """One folder of a tree.

    Attributes:
        path: Below the top of the tree, with "/"; "" is the top itself.
        state: Time of the last change in nanoseconds, and inode. Adding, removing or renaming an entry changes it.
        images: Names of the image files in it, sorted.
        num_others: Other files in it.
    """

    path: str
    state: list[int]
    images: list[str]
    num_others: int


def list_images(root: str | Path, split: str, show_progress: bool = False) -> ImageList:
    """The images below ``root/split/<class>/``, at any depth; hidden files and folders do not count.

    Raises:
        UserError: The root, the split, its class folders or the images of a class are missing.
    """
    return images_by_class(split_folder(root, split), read_tree(split_folder(root, split), show_progress))


def split_folder(root: str | Path, split: str) -> Path:
    """The folder ``root/split``.

    Raises:
        UserError: It is missing.
    """
    folder = Path(root) / split
    if not Path(root).is_dir():
        raise UserError(f"data.root is {str(root)!r}, which is not a folder; allowed: a folder that holds {split}/")
    if not folder.is_dir():
        raise UserError(f"{folder} is missing; {root} holds {shown(sorted(os.listdir(root)))}")
    return folder


def images_by_class(top: Path, tree: Sequence[Folder]) -> ImageList:
    """The images of ``tree``, each of the class that the folder below ``top`` on its path is called.

    Raises:
        UserError: There are no class folders, or no images in one.
    """
    paths: list[str] = []
    counts: dict[str, int] = {}
    num_ignored = 0
    for folder in tree[1:]:
        name = folder.path.split("/", 1)[0]
        counts[name] = counts.get(name, 0) + len(folder.images)
        paths += [f"{top}/{folder.path}/{image}" for image in folder.images]
        num_ignored += folder.num_others
    if not counts:
        names = sorted(entry.name for entry in os.scandir(top) if entry.name[0] != ".")
        raise UserError(f"{top} holds no class folders but {shown(names)}; put the images into {top}/<class>/")
    for name, count in counts.items():
        if count == 0:
            raise UserError(f"class folder {top / name} holds no images; allowed: {' '.join(IMAGE_EXTENSIONS)}")
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(list(counts.values())))
    return ImageList(paths, labels, list(counts), num_ignored)


def shown(names: Sequence[str]) -> str:
    """The first few names, as a sentence lists them."""
    more = f" and {len(names) - MAX_SHOWN:,} more" if len(names) > MAX_SHOWN else ""
    return (", ".join(names[:MAX_SHOWN]) or "nothing") + more


def read_tree(top: Path, show_progress: bool = False) -> list[Folder]:
    """The folder ``top`` and all below it, each before its subfolders, in sorted order; from the cache if it holds.

    It holds if no folder has changed since. A folder that was still changing a moment ago is not
    kept, because file systems tell times apart only so far.

    Raises:
        UserError: A folder cannot be read.
    """
    cache = cache_path(top)
    kept = _read_cache(cache, top)
    if kept is not None:
        return kept
    started = time.time()
    tree = list(progress(_walk(top), show=show_progress, desc=f"list {top.name}", unit="folder"))
    if max(folder.state[0] for folder in tree) < (started - SETTLED_SECONDS) * 1e9:
        try:
            _write_cache(cache, tree)
        except (OSError, UserError) as error:
            if show_progress:
                print(f"the list of {top} is not kept for the next start: {error}", file=sys.stderr)
    return tree


def cache_path(top: Path) -> Path:
    """Where the list of ``top`` is kept: below $XDG_CACHE_HOME, by default ~/.cache."""
    key = hashlib.sha256(json.dumps([CACHE_FORMAT, IMAGE_EXTENSIONS, str(top.resolve())]).encode()).hexdigest()
    # An empty or relative value counts as not set, says the specification of that variable.
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "mrl" / f"images-{key[:32]}.json"


def _state(folder: Path) -> list[int]:
    found = folder.stat()
    return [found.st_mtime_ns, found.st_ino]


def _walk(top: Path) -> Iterator[Folder]:
    waiting = [""]
    while waiting:
        path = waiting.pop()
        folder = top / path
        try:
            state = _state(folder)  # before its entries, so that a change meanwhile is a change
            entries = sorted((e for e in os.scandir(folder) if e.name[0] != "."), key=lambda entry: entry.name)
            is_folder = [entry.is_dir() for entry in entries]
        except OSError as error:
            raise UserError(f"{folder} cannot be listed: {error.strerror}") from error
        files = [entry.name for entry, below in zip(entries, is_folder, strict=True) if not below]
        images = [name for name in files if name.lower().endswith(IMAGE_EXTENSIONS)]
        prefix = f"{path}/" if path else ""
        below = [prefix + entry.name for entry, below in zip(entries, is_folder, strict=True) if below]
        waiting += reversed(below)
        yield Folder(path, state, images, len(files) - len(images))


def _read_cache(cache: Path, top: Path) -> list[Folder] | None:
    with contextlib.suppress(OSError, ValueError, TypeError):  # not there, cut short, or of another make
        tree = [Folder(*folder) for folder in json.loads(cache.read_bytes())]
        if tree and all(_state(top / folder.path) == folder.state for folder in tree):
            return tree
    return None


def _write_cache(cache: Path, tree: Sequence[Folder]) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    # Several processes, on several machines even, may write the same list at once: each to a folder of its own first.
    with tempfile.TemporaryDirectory(dir=cache.parent) as own:
        write_text(Path(own) / cache.name, json.dumps(tree))
        os.replace(Path(own) / cache.name, cache)
