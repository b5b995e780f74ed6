"""ImageNet as people have it: validation images in class folders or in one flat folder, Kaggle's layout or plain.

Whatever the layout, classes are WordNet ids (wnids) in sorted order, and images come in the same order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from mrl.data.folder import Folder, ImageList, images_by_class, read_tree, shown, split_folder
from mrl.errors import UserError

KAGGLE_FOLDER = Path("ILSVRC/Data/CLS-LOC")
DEVKIT_FOLDER = Path("ILSVRC2012_devkit_t12/data")
WNID = re.compile(r"n\d{8}")


def list_imagenet(root: str | Path, split: str, show_progress: bool = False) -> ImageList:
    """The images of ImageNet's train/ or val/ below ``root``, or below ``root``'s ILSVRC/Data/CLS-LOC.

    Raises:
        UserError: Files are missing, classes are no wnids, or flat validation images cannot be labeled with certainty.
    """
    root = Path(root)
    images_root = root / KAGGLE_FOLDER if (root / KAGGLE_FOLDER).is_dir() else root
    top = split_folder(images_root, split)
    tree = read_tree(top, show_progress)
    if split == "val" and tree[0].images and len(tree) == 1:
        found = label_flat(top, tree[0], [top, images_root, images_root / DEVKIT_FOLDER, *_kaggle_tops(images_root)])
    else:
        found = images_by_class(top, tree)
        if tree[0].images:
            raise UserError(
                f"{top} holds class folders and beside them {len(tree[0].images):,} images of no class "
                f"({shown(tree[0].images)}); move them into their classes, or away"
            )
    check_wnids(found.classes, split)
    return found


def _kaggle_tops(images_root: Path) -> list[Path]:
    """The folder above ILSVRC/Data/CLS-LOC, if that is where the images are."""
    inside = images_root.resolve()
    return [inside.parents[2]] if inside.parts[-3:] == KAGGLE_FOLDER.parts else []


def check_wnids(classes: Sequence[str], split: str) -> None:
    """Nothing, if the classes are wnids in ascending order.

    Raises:
        UserError: They are not.
    """
    others = [name for name in classes if not WNID.fullmatch(name)]
    if others:
        raise UserError(
            f"data.name imagenet has classes named by wnid such as n01440764, but {split} has {shown(others)}; "
            "for other images use data.name folder"
        )
    if list(classes) != sorted(set(classes)):
        raise UserError(f"the classes of {split} are not in ascending order of their wnids")


def label_flat(top: Path, folder: Folder, places: Sequence[Path]) -> ImageList:
    """The images of one flat folder with the classes that a ground truth in one of ``places`` gives them.

    Raises:
        UserError: There is no ground truth, it cannot be read, or it is not of exactly these images.
    """
    for place in places:
        for name, read in GROUND_TRUTHS.items():
            if (place / name).is_file():
                return _sorted_by_class(top, folder, read(place / name), place / name)
    raise UserError(
        f"{top} holds {len(folder.images):,} images and no class folders, and there is no ground truth for them; "
        f"allowed in {' or '.join(map(str, places[1:]))}: {' or '.join(GROUND_TRUTHS)} with the devkit's meta.mat"
    )


def _sorted_by_class(top: Path, folder: Folder, wnid_of: dict[str, str], truth: Path) -> ImageList:
    unlabeled = [image for image in folder.images if Path(image).stem not in wnid_of]
    if unlabeled:
        raise UserError(f"{truth} does not label {len(unlabeled):,} images of {top}: {shown(unlabeled)}")
    missing = sorted(wnid_of.keys() - {Path(image).stem for image in folder.images})
    if missing:
        raise UserError(f"{top} lacks {len(missing):,} of the {len(wnid_of):,} images in {truth}: {shown(missing)}")
    images = sorted(folder.images, key=lambda image: (wnid_of[Path(image).stem], image))
    classes, labels = np.unique([wnid_of[Path(image).stem] for image in images], return_inverse=True)
    paths = [f"{top}/{image}" for image in images]
    return ImageList(paths, torch.from_numpy(labels), classes.tolist(), folder.num_others)


def read_name_and_wnid(path: Path) -> dict[str, str]:
    """``{image name without extension: wnid}`` from lines of a name and a wnid, with commas or spaces between.

    What follows the wnid is left out, and so is Kaggle's line of headings.

    Raises:
        UserError: A line is not of that form, or names an image again.
    """
    wnid_of: dict[str, str] = {}
    for number, line in enumerate(_lines(path), start=1):
        words = line.replace(",", " ").split()
        if not words or words[0] == "ImageId":
            continue
        if len(words) < 2 or not WNID.fullmatch(words[1]):
            raise UserError(f"line {number} of {path} is {line[:60]!r}; allowed: an image name and a wnid")
        if wnid_of.setdefault(Path(words[0]).stem, words[1]) != words[1]:
            raise UserError(f"line {number} of {path} gives {words[0]} another class than a line before")
    return wnid_of


def read_devkit(path: Path) -> dict[str, str]:
    """``{image name without extension: wnid}`` from the devkit's ground truth and the meta.mat beside it.

    Line k of the ground truth is the ILSVRC2012_ID of ILSVRC2012_val_<k>.JPEG, k of eight digits.

    Raises:
        UserError: meta.mat is missing, or one of the two cannot be read.
    """
    meta = path.with_name("meta.mat")
    if not meta.is_file():
        raise UserError(f"{path} holds numbers whose classes stand in meta.mat; put the devkit's meta.mat beside it")
    from scipy.io import loadmat  # scikit-learn brings it along

    try:
        synsets = loadmat(str(meta), squeeze_me=True)["synsets"]
        wnids = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets}
    except Exception as error:  # scipy raises errors of many kinds on bad data
        raise UserError(f"{meta} is not the ILSVRC2012 devkit's: {error}") from error
    wnid_of: dict[str, str] = {}
    for number, line in enumerate(_lines(path), start=1):
        wnid = wnids.get(int(line)) if line.strip().isdecimal() else None
        if wnid is None:
            raise UserError(f"line {number} of {path} is {line[:60]!r}; allowed: an ILSVRC2012_ID of {meta}")
        wnid_of[f"ILSVRC2012_val_{number:08d}"] = wnid
    return wnid_of


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


GROUND_TRUTHS: dict[str, Callable[[Path], dict[str, str]]] = {
    "LOC_val_solution.csv": read_name_and_wnid,
    "val_wnids.txt": read_name_and_wnid,
    "ILSVRC2012_validation_ground_truth.txt": read_devkit,
}
