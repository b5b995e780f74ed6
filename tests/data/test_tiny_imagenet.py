import io
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from torchcodec.encoders import JpegEncoder

from mrl.data.tiny_imagenet import main, prepare
from mrl.errors import UserError

WNIDS = ["n01443537", "n01629819", "n12267677"]
COUNTS = (3, 10, 2)


def jpeg(number):
    return JpegEncoder(torch.full((3, 64, 64), number % 256, dtype=torch.uint8)).to_tensor().numpy().tobytes()


def add(tar, name, content, kind=tarfile.REGTYPE):
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, len(content)
    member.linkname = "/etc/hostname" if kind == tarfile.SYMTYPE else ""
    tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path):
    """Five train shards of 2 images a class, and 2 validation images a class."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(5):
        with tarfile.open(folder / f"train-{shard}.tar.gz", "w:gz") as tar:
            for wnid in WNIDS:
                for n in (2 * shard, 2 * shard + 1):
                    add(tar, f"train/{wnid}/{wnid}_{n}.JPEG", jpeg(n))
    with tarfile.open(folder / "val.tar.gz", "w:gz") as tar:
        for n in range(6):
            add(tar, f"val/{WNIDS[n % 3]}/val_{n}.JPEG", jpeg(100 + n))
    (folder / "words.txt").write_text("n01443537\tgoldfish\n")
    return folder


@pytest.fixture
def official(tmp_path):
    """The official folder, unpacked: images/ below each train class, a flat val with annotations, a test split."""
    root = tmp_path / "official" / "tiny-imagenet-200"
    for wnid in WNIDS:
        (root / "train" / wnid / "images").mkdir(parents=True)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
        for n in range(10):
            (root / "train" / wnid / "images" / f"{wnid}_{n}.JPEG").write_bytes(jpeg(n))
    (root / "val" / "images").mkdir(parents=True)
    (root / "test" / "images").mkdir(parents=True)
    (root / "test" / "images" / "test_0.JPEG").write_bytes(jpeg(0))
    lines = []
    for n in range(6):
        (root / "val" / "images" / f"val_{n}.JPEG").write_bytes(jpeg(100 + n))
        lines.append(f"val_{n}.JPEG\t{WNIDS[n % 3]}\t0\t32\t44\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "words.txt").write_text("n01443537\tgoldfish\n")
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
    found = files(tmp_path / "a")
    assert len(found) == 37
    assert found["train/n12267677/n12267677_9.JPEG"] == jpeg(9)
    assert found["val/n01629819/val_4.JPEG"] == jpeg(104)
    assert found["words.txt"] == b"n01443537\tgoldfish\n"
    assert found == files(tmp_path / "b") == files(tmp_path / "c") == files(tmp_path / "d")


def test_a_source_of_another_kind_is_refused(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(UserError, match=r"photos is not Tiny-ImageNet; allowed: tiny-imagenet-200.zip"):
        prepare(tmp_path / "photos", tmp_path / "out")
    with pytest.raises(UserError, match="nowhere does not exist"):
        prepare(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(UserError, match="photos already exists"):
        prepare(tmp_path, tmp_path / "photos")


def test_a_missing_image_is_counted_and_a_truncated_archive_leaves_nothing(shards, tmp_path):
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(UserError, match=f"has 10 train images of class {WNIDS[0]}, not 11"):
        prepare(shards, tmp_path / "out", expected=(3, 11, 2))
    with pytest.raises(UserError, match="has images of 3 classes, not 200"):
        prepare(shards, tmp_path / "out")
    path = shards / "train-3.tar.gz"
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(UserError, match="failed, nothing was left at"):
        prepare(shards, tmp_path / "out", expected=COUNTS)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_nothing_in_an_archive_is_written_outside_out_or_as_a_link(shards, tmp_path):
    with tarfile.open(shards / "train-0.tar.gz", "w:gz") as tar:
        for wnid in WNIDS:
            for n in (0, 1):
                add(tar, f"train/{wnid}/{wnid}_{n}.JPEG", jpeg(n))
        add(tar, "../../escaped.JPEG", b"bad")
        add(tar, f"train/../{WNIDS[0]}.JPEG", b"bad")
        add(tar, "/etc/n00000000/absolute.JPEG", b"bad")
        add(tar, f"train/{WNIDS[0]}/..", b"bad")
        add(tar, f"train/{WNIDS[0]}/link.JPEG", b"", tarfile.SYMTYPE)
        add(tar, f"train/{WNIDS[0]}/run.sh", b"bad")
    before = {*files(tmp_path)}
    prepare(shards, tmp_path / "out", expected=COUNTS)
    new = {name for name in files(tmp_path) if name not in before}
    assert len(new) == 37 and all(name.startswith("out/") for name in new)
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
