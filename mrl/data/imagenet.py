"""ImageNet in its usual layouts: Kaggle's or plain, validation images in class folders or in one flat folder.

In every layout the classes are WordNet ids (wnids) in sorted order, and the images come in the same order.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch

from mrl.data.folder import ImageList, LeftOut, count_other_files, is_image, list_images, shown, split_folder, walk
from mrl.errors import UserError

KAGGLE_FOLDER = Path("ILSVRC/Data/CLS-LOC")
DEVKIT_FOLDER = Path("ILSVRC2012_devkit_t12/data")
DEVKIT_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
GROUND_TRUTHS = ("LOC_val_solution.csv", "val_wnids.txt", DEVKIT_TRUTH)
WNID = re.compile(r"n\d{8}")


def list_split(name: str, root: str | Path, split: str, show_progress: bool, missing_classes: str) -> ImageList:
    """List the images of ``split`` as ``data.name`` says."""
    return (list_imagenet if name == "imagenet" else list_images)(root, split, show_progress, missing_classes)


def list_imagenet(root: str | Path, split: str, show_progress: bool = False, missing_classes: str = "") -> ImageList:
    """List the images of ``split`` below ``root``, or below ``root``'s ILSVRC/Data/CLS-LOC."""
    root = Path(root)
    root = root / KAGGLE_FOLDER if (root / KAGGLE_FOLDER).is_dir() else root
    top, left_out = split_folder(root, split), LeftOut()
    _, folders, files = next(walk(top, left_out))
    beside = [file for file in files if is_image(file)]
    if split == "val" and beside and not folders:
        count_other_files(files, left_out)
        inside = root.resolve()
        above = [inside.parents[2]] if inside.parts[-3:] == KAGGLE_FOLDER.parts else []
        found = _label_flat(top, beside, left_out, [top, root, root / DEVKIT_FOLDER, *above])
    else:
        found = list_images(root, split, show_progress, missing_classes)
        if beside:
            raise UserError(
                f"{top} has class folders and {len(beside):,} images beside them ({shown(beside)}); "
                "move those into their classes, or away"
            )
    others = [name for name in found.classes if not WNID.fullmatch(name)]
    if others:
        raise UserError(
            f"data.name imagenet has classes named by wnid such as n01440764, but {split} has {shown(others)}; "
            "for other images use data.name folder"
        )
    return found


def _label_flat(top: Path, images: list[str], left_out: LeftOut, places: list[Path]) -> ImageList:
    """Label the images of one flat folder by the first ground truth found in ``places``."""
    truth = next((place / name for place in places for name in GROUND_TRUTHS if (place / name).is_file()), None)
    if truth is None:
        raise UserError(
            f"{top} has {len(images):,} images and no class folders, and there is no ground truth for them; "
            f"allowed in {' or '.join(map(str, places[1:]))}: {' or '.join(GROUND_TRUTHS)} with the devkit's meta.mat"
        )
    wnid_of = read_devkit(truth) if truth.name == DEVKIT_TRUTH else read_wnids(truth)
    name_of = {image: Path(image).stem for image in images}
    if unlabeled := [image for image, name in name_of.items() if name not in wnid_of]:
        raise UserError(f"{truth} does not label {len(unlabeled):,} images of {top}: {shown(unlabeled)}")
    if missing := sorted(wnid_of.keys() - name_of.values()):
        raise UserError(f"{top} lacks {len(missing):,} of the {len(wnid_of):,} images in {truth}: {shown(missing)}")
    labeled = sorted((wnid_of[name], f"{top}/{image}") for image, name in name_of.items())
    classes, labels = np.unique([wnid for wnid, _ in labeled], return_inverse=True)
    return ImageList([path for _, path in labeled], torch.from_numpy(labels), classes.tolist(), left_out)


def read_wnids(path: Path) -> dict[str, str]:
    """Return ``{image name without extension: wnid}`` from lines of a name, a comma or space, a wnid, and more."""
    wnid_of: dict[str, str] = {}
    for number, line in enumerate(_lines(path), start=1):
        fields = line.replace(",", " ").split()
        if not fields or fields[0] == "ImageId":  # Kaggle's header
            continue
        if len(fields) < 2 or not WNID.fullmatch(fields[1]):
            raise UserError(f"line {number} of {path} is {line[:60]!r}; allowed: an image name and a wnid")
        if wnid_of.setdefault(Path(fields[0]).stem, fields[1]) != fields[1]:
            raise UserError(f"line {number} of {path} gives {fields[0]} another class than a line before")
    return wnid_of


def read_devkit(path: Path) -> dict[str, str]:
    """Return ``{image name without extension: wnid}`` from the devkit's ground truth and the meta.mat beside it.

    Line k holds the ILSVRC2012_ID of ILSVRC2012_val_<k>.JPEG, k of eight digits.
    """
    from scipy.io import loadmat

    meta = path.with_name("meta.mat")
    if not meta.is_file():
        raise UserError(f"{path} needs the class ids in meta.mat; put the devkit's meta.mat beside it")
    try:
        synsets = loadmat(str(meta), squeeze_me=True)["synsets"]
        wnids = {str(int(synset["ILSVRC2012_ID"])): str(synset["WNID"]) for synset in synsets}
    except Exception as error:  # scipy raises errors of many kinds on bad data
        raise UserError(f"{meta} is not the ILSVRC2012 devkit's: {error}") from error
    wnid_of: dict[str, str] = {}
    for number, line in enumerate(_lines(path), start=1):
        if line.strip() not in wnids:
            raise UserError(f"line {number} of {path} is {line[:60]!r}; allowed: an ILSVRC2012_ID of {meta}")
        wnid_of[f"ILSVRC2012_val_{number:08d}"] = wnids[line.strip()]
    return wnid_of


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
