import numpy as np
import pytest
import torch

from mrl.config import DataConfig
from mrl.data import build_data, list_splits
from mrl.data.imagenet import list_imagenet
from mrl.errors import UserError

CPU = torch.device("cpu")
# Not in the order of their numbers in the devkit, and not in the order in which they occur.
WNIDS = ["n03000684", "n01440764", "n02102040"]
IDS = {3: "n01440764", 1: "n02102040", 2: "n03000684"}
VAL = dict(zip(range(1, 8), [WNIDS[i] for i in (0, 1, 1, 2, 0, 2, 1)], strict=True))


def name_of(number):
    return f"ILSVRC2012_val_{number:08d}"


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")


@pytest.fixture
def flat(tmp_path):
    """Training images in class folders, seven validation images in one."""
    for wnid in WNIDS:
        touch(tmp_path / "train" / wnid / f"{wnid}_1.JPEG")
    for number in VAL:
        touch(tmp_path / "val" / f"{name_of(number)}.JPEG")
    return tmp_path


def write_solution(folder):
    lines = [f"{name_of(number)},{wnid} 1 2 3 4 {wnid} 5 6 7 8 " for number, wnid in reversed(VAL.items())]
    (folder / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *lines]) + "\n")


def write_list(folder):
    lines = [f"x/{name_of(n)}.JPEG{', '[n % 2]}{wnid} and more\r\n" for n, wnid in VAL.items()]
    (folder / "val_wnids.txt").write_text("".join(lines))


def write_devkit(folder):
    """In the form of the devkit: inner nodes too, struct array in a column, one number a line."""
    from scipy.io import savemat

    folder.mkdir(parents=True, exist_ok=True)
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O"), ("children", "O")]
    rows = [(number, wnid, "a, b", 0, np.zeros((1, 0))) for number, wnid in IDS.items()]
    rows.append((4, "n00001740", "entity", 3, np.array([[1, 2, 3]])))
    savemat(folder / "meta.mat", {"synsets": np.array(rows, dtype=fields)[:, None]})
    numbers = {wnid: number for number, wnid in IDS.items()}
    truth = "".join(f"{numbers[wnid]}\n" for wnid in VAL.values())
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text(truth)


GROUND_TRUTHS = {
    "Kaggle's": write_solution,
    "a list": write_list,
    "the devkit's files": write_devkit,
    "the devkit's folder": lambda root: write_devkit(root / "ILSVRC2012_devkit_t12" / "data"),
    "beside the images": lambda root: write_devkit(root / "val"),
}


@pytest.mark.parametrize("write", GROUND_TRUTHS.values(), ids=GROUND_TRUTHS)
def test_flat_validation_images_come_as_those_in_class_folders_do(flat, tmp_path, write):
    for number, wnid in VAL.items():
        touch(tmp_path / "sorted" / "val" / wnid / f"{name_of(number)}.JPEG")
    expected = list_imagenet(tmp_path / "sorted", "val")
    write(flat)
    found = list_imagenet(flat, "val")
    assert found.classes == expected.classes == sorted(WNIDS)
    assert torch.equal(found.labels, expected.labels) and found.labels.dtype == torch.int64
    names = [path.rsplit("/", 1)[-1] for path in found.paths]
    assert names == [path.rsplit("/", 1)[-1] for path in expected.paths]
    assert found.paths[0] == f"{flat}/val/{name_of(2)}.JPEG", "the first of the lowest wnid"


def test_kaggles_layout_is_found_from_its_top_and_from_within(flat):
    inside = flat / "kaggle" / "ILSVRC" / "Data" / "CLS-LOC"
    inside.mkdir(parents=True)
    for split in ("train", "val"):
        (flat / split).rename(inside / split)
    write_solution(flat / "kaggle")
    for root in (flat / "kaggle", inside):
        lists = list_splits(DataConfig(name="imagenet", root=str(root)), ["train", "val"])
        assert lists["train"].classes == lists["val"].classes == sorted(WNIDS)
        assert lists["val"].paths[0] == f"{inside}/val/{name_of(2)}.JPEG"


def refused(root, split="val"):
    with pytest.raises(UserError) as raised:
        list_imagenet(root, split)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_flat_images_without_a_ground_truth_are_refused_naming_what_is_allowed(flat):
    message = refused(flat)
    assert "has 7 images and no class folders" in message and str(flat / "ILSVRC2012_devkit_t12" / "data") in message
    for name in ("LOC_val_solution.csv", "val_wnids.txt", "ILSVRC2012_validation_ground_truth.txt", "meta.mat"):
        assert name in message


def test_stray_files_are_counted_and_images_and_labels_must_match(flat):
    write_solution(flat)
    touch(flat / "val" / "readme.txt")
    touch(flat / "val" / ".DS_Store")
    assert list_imagenet(flat, "val").left_out.total() == 1
    touch(flat / "val" / "holiday.jpg")
    assert "LOC_val_solution.csv does not label 1 images of " in refused(flat)
    (flat / "val" / "holiday.jpg").unlink()
    (flat / "val" / f"{name_of(3)}.JPEG").unlink()
    assert f"val lacks 1 of the 7 images in {flat}/LOC_val_solution.csv: {name_of(3)}" in refused(flat)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"ILSVRC2012_val_00000001.JPEG 65\n", "line 1 of {path} is 'ILSVRC2012_val_00000001.JPEG 65'"),
        (b"a.JPEG n01440764\n\na.JPEG n02102040\n", "line 3 of {path} gives a.JPEG another class"),
        (b"\xff\xfe", "{path} cannot be read"),
    ],
)
def test_a_bad_list_is_refused(flat, content, message):
    (flat / "val_wnids.txt").write_bytes(content)
    assert message.format(path=flat / "val_wnids.txt") in refused(flat)


def test_a_devkit_that_is_incomplete_or_damaged_is_refused(flat):
    write_devkit(flat)
    truth = flat / "ILSVRC2012_validation_ground_truth.txt"
    whole = truth.read_text()
    truth.write_text("9\n" + whole)
    assert f"line 1 of {truth} is '9'; allowed: an ILSVRC2012_ID" in refused(flat)
    truth.write_text(whole)
    (flat / "meta.mat").write_bytes((flat / "meta.mat").read_bytes()[:200])
    assert f"{flat}/meta.mat is not the ILSVRC2012 devkit's" in refused(flat)
    (flat / "meta.mat").unlink()
    assert "put the devkit's meta.mat beside it" in refused(flat)


def test_class_folders_must_be_complete_and_named_by_wnid(flat):
    write_solution(flat)
    with pytest.raises(UserError, match="has no class folders, only ILSVRC2012_val_00000001.JPEG"):
        list_splits(DataConfig(name="folder", root=str(flat)), ["val"])
    touch(flat / "train" / "n09999999" / "1.JPEG")
    with pytest.raises(UserError, match="differ: only in train: n09999999; only in val: nothing"):
        build_data(DataConfig(name="imagenet", root=str(flat)), 0, CPU)
    touch(flat / "train" / "tmp" / "1.JPEG")
    message = "named by wnid such as n01440764, but train has tmp; for other images use data.name folder"
    assert message in refused(flat, "train")
    (flat / "val" / WNIDS[0]).mkdir()
    (flat / "val" / f"{name_of(1)}.JPEG").rename(flat / "val" / WNIDS[0] / f"{name_of(1)}.JPEG")
    assert "val has 6 images beside its class folders" in refused(flat)
