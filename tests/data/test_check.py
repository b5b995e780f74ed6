import shutil

from PIL import Image

from mrl.data.check import main


def test_a_folder_is_checked_whole_and_every_fault_is_listed(two_classes, capsys):
    root = two_classes.root
    assert main([str(root)]) == 0
    assert capsys.readouterr().out == f"{root}: 12 images, 0 faults, 0 JPEGs without an end marker\n"
    (root / "train" / "a" / "1.png").write_bytes(b"")
    (root / "val" / "b" / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(20))
    Image.new("RGB", (40, 40)).save(root / "val" / "a" / "9.jpg")
    (root / "val" / "a" / "9.jpg").write_bytes((root / "val" / "a" / "9.jpg").read_bytes()[:-2])
    shutil.copytree(root / "val" / "a", root / "val" / "@eaDir")
    assert main([str(root)]) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    starts = [f"{root}/train/a/1.png cannot be read", f"{root}/val/a/9.jpg is a JPEG", f"{root}/val/b/2.png cannot be"]
    assert [line.startswith(start) for line, start in zip(lines, starts, strict=True)] == [True] * 3
    assert last.endswith("13 images, 2 faults, 1 JPEGs without an end marker; left out: 1 folders of tools (@eaDir)")


def test_a_tree_that_no_training_takes_is_a_fault_too(two_classes, tmp_path, capsys):
    (two_classes.root / "val" / "b").rename(two_classes.root / "val" / "c")
    assert main([str(two_classes.root)]) == 1
    assert "the classes of train and val differ: only in train: b; only in val: c" in capsys.readouterr().out
    assert main([str(tmp_path / "gone")]) == 2 and "is not a folder" in capsys.readouterr().err


def test_imagenets_flat_validation_images_are_checked_with_their_classes(image_folder, capsys):
    root = image_folder({split: {"n01440764": 1, "n01443537": 1} for split in ("train", "val")})
    for folder in sorted((root / "val").iterdir()):
        (folder / "0.png").rename(root / "val" / f"{folder.name}.png")
        folder.rmdir()
    assert main([str(root)]) == 1
    (root / "val_wnids.txt").write_text("n01440764.png n01440764\nn01443537.png n01443537\n")
    assert main([str(root), "--name", "imagenet"]) == 0
