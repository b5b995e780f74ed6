import math
import re
import shutil
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

import mrl
from mrl.model import build_backbone

open_clip = pytest.importorskip("open_clip", reason="needs open_clip: pip install open_clip_torch")
from open_clip.transformer import TextTransformer  # noqa: E402

from examples import clip  # noqa: E402

COLORS = ("black", "blue", "cyan", "gray", "green", "magenta", "orange", "red", "white", "yellow")


def test_the_loss_is_open_clips_and_its_matryoshka_sum_that_of_the_prefixes():
    z, t, scale = torch.randn(7, 12), torch.randn(7, 12), torch.tensor(9.0)
    theirs = {dim: open_clip.ClipLoss()(*(mrl.unit_prefix(x, dim) for x in (z, t)), scale) for dim in (3, 6, 12)}
    torch.testing.assert_close(clip.contrastive_loss(z, t, scale), theirs[12])
    weighted = mrl.MatryoshkaLoss(clip.contrastive_loss, (3, 6, 12), weights=(2, 1, 0.5))(z, t, scale=scale)
    torch.testing.assert_close(weighted, 2 * theirs[3] + theirs[6] + 0.5 * theirs[12])


def test_pairs_count_by_their_weights():
    z, t, scale, weights = torch.randn(4, 6), torch.randn(4, 6), torch.tensor(2.0), torch.tensor([1.0, 0.0, 2.0, 0.5])
    cosines = np.array([[F.cosine_similarity(a, b, dim=0).item() for b in t] for a in z])
    expected = 0.0
    for i, weight in enumerate(weights.tolist()):
        for scores in (2 * cosines[i], 2 * cosines[:, i]):
            expected += weight * (math.log(np.exp(scores).sum()) - scores[i]) / 2 / 3.5
    assert clip.contrastive_loss(z, t, scale, weights).item() == pytest.approx(expected, abs=1e-5)


def test_every_block_of_coordinates_and_both_towers_get_gradients():
    texts = clip.tokenize(list(COLORS), None)
    image = torch.nn.Linear(5, 8)
    text = TextTransformer(texts.shape[-1], int(texts.max()) + 1, 16, 2, 1, output_dim=8)
    towers = clip.Towers(image, text)
    losses = []

    def loss_fn(z, t, scale, pair_weights):
        assert z.shape == t.shape == (6, 8) and pair_weights.shape == (6,)
        losses.append(
            mrl.MatryoshkaLoss(clip.contrastive_loss, (2, 4, 8))(z, t, scale=scale, pair_weights=pair_weights)
        )
        return losses[-1]

    labels = torch.arange(40) % 10
    pairs = clip.Pairs(torch.eye(10)[labels][:, :5] + torch.randn(40, 5) / 9, labels, texts, torch.ones(4))
    before = image.weight.detach().clone()
    clip.train(towers, pairs, loss_fn, lr=0.01, steps=30, batch_size=6)
    assert len(losses) == 30 and losses[-1] < losses[0]
    assert ((image.weight - before).abs().amax(dim=1) > 0).all()
    assert (text.text_projection.grad.abs().amax(dim=0) > 0).all() and towers.log_scale.grad


def test_captions_end_at_their_largest_token_and_half_of_them_name_the_superclass_only():
    named, both = clip.tokenize(["ant", "tabby cat"], None), clip.tokenize(["ant", "bee"], ["insect", "insect"])
    assert named.shape[:2] == (2, 4) and both.shape[:2] == (2, 8)
    assert both.flatten(0, 1).unique(dim=0).shape[0] == 8 + 4
    assert torch.equal(both[0, 4:], both[1, 4:])
    end = named.argmax(dim=-1, keepdim=True)
    assert (named.gather(-1, end) == named.max()).all()
    assert all((named[c, k, place + 1 :] == 0).all() for c in range(2) for k, place in enumerate(end[c, :, 0]))


def test_scores_by_hand():
    """Class 1 is left out; the image of class 2 that lies nearer to class 0 is wrong, and the second for class 0."""
    texts = torch.tensor([[1.0, 0.0], [9.0, 9.0], [0.0, 2.0]])[:, None].expand(3, 4, 2)
    images = torch.tensor([[3.0, 0.0], [0.0, 1.0], [2.0, 1.0], [9.0, 9.0]])
    top_1, ndcg = clip.score(images, texts, torch.tensor([0, 2, 2, 1]), torch.tensor([0, 2]))
    assert top_1 == pytest.approx(2 / 3) and ndcg == pytest.approx(1.0)
    images[0], images[2] = images[2].clone(), images[0].clone()  # the image of class 0 is now the second for it
    top_1, ndcg = clip.score(images, texts, torch.tensor([0, 2, 2, 1]), torch.tensor([0, 2]))
    second, first_and_third = 1 / math.log2(3), (1 + 1 / 2) / (1 + 1 / math.log2(3))
    assert top_1 == pytest.approx(2 / 3) and ndcg == pytest.approx((second + first_and_third) / 2)


@pytest.fixture(scope="module")
def colored(tmp_path_factory):
    """Ten classes of plain images, by color, and random weights of a small backbone."""
    folder = tmp_path_factory.mktemp("colored")
    generator = np.random.default_rng(0)
    for color in COLORS:
        plain = np.array(Image.new("RGB", (32, 32), color), dtype=float)
        for split, number in (("train", 6), ("val", 3)):
            (folder / split / color).mkdir(parents=True)
            for i in range(number):
                noisy = plain + generator.normal(0, 12, plain.shape)
                Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / split / color / f"{i}.png")
    torch.manual_seed(0)
    save_file(build_backbone("test_resnet").state_dict(), folder / "weights.safetensors")
    return folder


def argv_of(folder, *more):
    given = {"data": folder, "backbone": "test_resnet", "weights": folder / "weights.safetensors", "px": 32}
    given |= {"features": folder / "features", "steps": 60}
    return [text for key, value in given.items() for text in (f"--{key}", str(value))] + list(more)


def test_every_method_finds_colors_by_name_above_chance(colored, capsys):
    assert clip.main(argv_of(colored, "--dims", "4", "16", "--lrs", "0.01", "--seeds", "0")) == 0
    printed = capsys.readouterr().out
    assert "held out: green, yellow" in printed and "chance: top-1 12.5 of seen, 50.0 of held-out classes" in printed
    for metric, lowest in (("top-1", 40), ("nDCG@10", 50)):
        table = printed.partition(f"{metric}, images of seen classes (%)")[2].partition("(%)")[0]
        for method in clip.METHODS:
            [small, large] = re.findall(rf"\| {method} \| 0.01 \| ([\d.]+) ± 0.0 \| ([\d.]+) ± 0.0 \|", table)[0]
            assert float(large) > lowest
            if method != "truncated":
                assert float(small) > lowest


def test_what_cannot_be_compared_is_one_sentence(colored, tmp_path, monkeypatch, capsys):
    (tmp_path / "words.tsv").write_text("class\tname\tsuperclass\nblack\tblack\tdark\n")
    assert clip.main(argv_of(colored, "--words", str(tmp_path / "words.tsv"))) == 2
    assert "has no line for class 'blue'" in capsys.readouterr().err
    for color in COLORS[:3]:
        shutil.copytree(colored / "train" / color, tmp_path / "few" / color)
    assert clip.main(argv_of(colored, "--data", str(tmp_path / "few"))) == 2
    assert "has 3 classes; needed are 10" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "open_clip", None)  # as if it was not installed
    assert clip.main(argv_of(colored)) == 2
    assert "pip install open_clip_torch" in capsys.readouterr().err


def test_weights_reach_the_training_of_captions_with_superclasses(colored, tmp_path, monkeypatch, capsys):
    seen, compare = [], clip.compare

    def spy(pairs, images, dims, rates, weights, **rest):
        seen.append((pairs.weights.tolist(), weights))
        return compare(pairs, images, dims, rates, weights, **rest)

    monkeypatch.setattr(clip, "compare", spy)
    lines = [f"{color}\t{color}\t{'dark' if i < 5 else 'light'}\n" for i, color in enumerate(COLORS)]
    (tmp_path / "words.tsv").write_text("class\tname\tsuperclass\n" + "".join(lines))
    few = "--dims 4 16 --lrs 0.01 --seeds 0 --steps 1"
    argv = ["--words", str(tmp_path / "words.tsv"), *few.split()]
    assert clip.main(argv_of(colored, *argv, "--dim_weights", "1", "4", "--group_weight", "0.5")) == 0
    assert seen == [([1.0] * 4 + [0.5] * 4, [1.0, 4.0])]
    assert "knowing the superclass alone: top-1" in capsys.readouterr().out
