import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from mrl.data.tiny_imagenet import main, prepare
from mrl.errors import UserError

WNIDS = ["n01443537", "n01629819", "n12267677"]
COUNTS = (3, 10, 2)
# What comes out of every layout: 10 training and 2 validation images a class.
PREPARED = {f"train/{wnid}/{wnid}_{n}.JPEG": bytes([n]) for wnid in WNIDS for n in range(10)}
PREPARED |= {f"val/{WNIDS[n % 3]}/val_{n}.JPEG": bytes([100 + n]) for n in range(6)}
PREPARED |= {"words.txt": b"n01443537\tgoldfish\n"}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def add(tar, name, content, kind=tarfile.REGTYPE):
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, len(content)
    member.linkname = "/etc/hostname" if kind == tarfile.SYMTYPE else ""
    tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path):
    """Five train shards of 2 images a class, and the validation images."""
    folder = tmp_path / "shards"
    write(folder / "words.txt", PREPARED["words.txt"])
    for shard in [*range(5), None]:
        name = "val" if shard is None else f"train-{shard}"
        with tarfile.open(folder / f"{name}.tar.gz", "w:gz") as tar:
            for path, content in PREPARED.items():
                if path.startswith(name[:3]) and shard in (None, content[0] // 2):
                    add(tar, path, content)
    return folder


@pytest.fixture
def official(tmp_path):
    """The official folder, unpacked: images/ below each train class, a flat val with annotations, a test split."""
    root, annotations = tmp_path / "official" / "tiny-imagenet-200", ""
    for path, content in PREPARED.items():
        match path.split("/"):
            case ["train", wnid, image]:
                write(root / "train" / wnid / "images" / image, content)
                write(root / "train" / wnid / f"{wnid}_boxes.txt", b"")
            case ["val", wnid, image]:
                write(root / "val" / "images" / image, content)
                annotations += f"{image}\t{wnid}\t0\t32\t44\t62\n"
            case [words]:
                write(root / words, content)
    write(root / "test" / "images" / "test_0.JPEG", b"0")
    write(root / "val" / "val_annotations.txt", annotations.encode())
    return root


@pytest.fixture
def official_zip(official, tmp_path):
    path = tmp_path / "tiny-imagenet-200.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(official.rglob("*")):
            archive.write(file, file.relative_to(official.parent))
    return path


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_all_layouts_give_the_same_class_folders(shards, official, official_zip, tmp_path):
    for name, source in {"a": shards, "b": official, "c": official.parent, "d": official_zip}.items():
        assert prepare(source, tmp_path / name, expected=COUNTS) == {"train": 30, "val": 6}
        assert files(tmp_path / name) == PREPARED


def test_what_is_no_tiny_imagenet_or_incomplete_is_refused_and_leaves_nothing(shards, tmp_path):
    (tmp_path / "photos").mkdir()
    before = sorted(path.name for path in tmp_path.iterdir())
    cut = tmp_path / "shards" / "train-3.tar.gz"
    for source, out, expected, message in (
        ("photos", "out", COUNTS, r"photos is not Tiny-ImageNet; allowed: tiny-imagenet-200.zip"),
        ("nowhere", "out", COUNTS, "nowhere does not exist"),
        ("shards", "photos", COUNTS, "photos already exists"),
        ("shards", "out", (3, 11, 2), f"has 10 train images of class {WNIDS[0]}, not 11"),
        ("shards", "out", (200, 500, 50), "has images of 3 classes, not 200"),
        ("shards", "out", None, "failed, nothing was left at"),
    ):
        if expected is None:
            cut.write_bytes(cut.read_bytes()[:100])
        with pytest.raises(UserError, match=message):
            prepare(tmp_path / source, tmp_path / out, expected=expected or COUNTS)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_nothing_in_an_archive_is_written_outside_out_or_as_a_link(shards, tmp_path):
    with tarfile.open(shards / "train-5.tar.gz", "w:gz") as tar:
        for name in ("../../escaped.JPEG", f"train/../{WNIDS[0]}.JPEG", "/etc/n00000000/absolute.JPEG"):
            add(tar, name, b"bad")
        for name in (f"train/{WNIDS[0]}/..", f"train/{WNIDS[0]}/run.sh"):
            add(tar, name, b"bad")
        add(tar, f"train/{WNIDS[0]}/link.JPEG", b"", tarfile.SYMTYPE)
    before = {*files(tmp_path)}
    prepare(shards, tmp_path / "out", expected=COUNTS)
    assert {name for name in files(tmp_path) if name not in before} == {f"out/{name}" for name in PREPARED}
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_and_an_interruption_leave_nothing(shards, tmp_path, monkeypatch, capsys, error):
    before = sorted(path.name for path in tmp_path.iterdir())
    opened, written = Path.open, []

    def fail_at_the_tenth(self, mode="r", *rest, **keywords):
        written.append(self)
        if len(written) == 10:
            raise error
        return opened(self, mode, *rest, **keywords)

    monkeypatch.setattr(Path, "open", fail_at_the_tenth)
    status = main(["--source", str(shards), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert status == (130 if isinstance(error, KeyboardInterrupt) else 2)
    assert f"nothing was left at {tmp_path}/out" in said
    assert isinstance(error, KeyboardInterrupt) or "No space left on device" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == before
