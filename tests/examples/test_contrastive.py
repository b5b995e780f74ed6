import re
import sys

import torch
import torch.nn.functional as F

from examples import contrastive
from tests.test_your_images import draw


def test_info_nce_is_the_written_out_definition_and_ignores_lengths():
    first, second, lengths = torch.randn(4, 6), torch.randn(4, 6), torch.rand(4, 1) + 0.5
    expected = 0.0
    for a, b in ((first, second), (second, first)):
        for i in range(4):
            scores = torch.stack([F.cosine_similarity(a[i], b[j], dim=0) / 0.5 for j in range(4)])
            expected += -(scores[i] - scores.exp().sum().log()).item() / 8
    for scale in (1.0, lengths):
        assert abs(contrastive.info_nce(first * scale, second, 0.5).item() - expected) < 1e-5


def test_the_example_learns_to_pair_the_crops_of_an_image(monkeypatch, capsys):
    argv = ["--epochs", "2", "--px", "16", "--backbone", "test_resnet", "--batch_size", "64"]
    monkeypatch.setattr(sys, "argv", ["contrastive", *argv])
    assert contrastive.main() == 0
    printed = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+) per dim", printed)]
    assert len(losses) == 2 and losses[1] < losses[0]
    assert re.search(r"1-NN after: 0\.\d+ @12, 0\.\d+ @24, 0\.\d+ @48, 0\.\d+ @96", printed)


def test_a_folder_of_images_is_paired_and_one_that_does_not_exist_is_one_sentence(monkeypatch, capsys, tmp_path):
    draw(tmp_path / "train", cat=8, dog=8)
    draw(tmp_path / "val", cat=2, dog=2)
    small = ["--epochs", "1", "--px", "32", "--backbone", "test_resnet", "--batch_size", "8"]
    for folder, status in ((tmp_path, 0), (tmp_path / "none", 2)):
        monkeypatch.setattr(sys, "argv", ["contrastive", "--images", str(folder), *small])
        assert contrastive.main() == status
    printed = capsys.readouterr()
    [line] = printed.err.strip().splitlines()
    assert "1-NN after: " in printed.out and line.startswith(f"error: data.root is '{tmp_path}/none'")
