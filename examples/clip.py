"""Train image and text embeddings together, as CLIP does, so that every prefix finds images by text.

    pip install open_clip_torch
    python -m examples.clip --data DIR                      # DIR/<class>/, or DIR/train/<class>/ and DIR/val/<class>/
    python -m examples.clip --data DIR --words classes.tsv  # with superclasses in the captions

The image tower is a pretrained timm backbone, frozen and computed once, and a trained projection. The text tower is
open_clip's text transformer, small and from scratch, on captions made from the names of the classes. Three ways to
vectors of each dim are compared, each at its own best learning rate (on a fifth of the training images, seed 0):

- nested: `mrl.MatryoshkaLoss` around the contrastive loss; a smaller vector is a prefix;
- truncated: trained at the full width only; a smaller vector is a prefix;
- projected: the same model, and for each dim two linear maps, of images and of texts, trained afterwards.

Every fifth class is held out of the training. Its images are scored too, among the held-out classes.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import math
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import ndcg_score
from torch import Tensor, nn

import mrl
from mrl import distributed
from mrl.config import Config, DataConfig, ModelConfig, images_of_weights
from mrl.data import build_data
from mrl.model import build_backbone, build_model, freeze
from mrl.studies.hierarchy import read_class_table
from mrl.training.frozen import CachedImages, TrunkCache

METHODS = ("nested", "truncated", "projected")
TEMPLATES = ("a photo of a {}", "a picture of the {}", "a small photo of one {}", "{}")
Vectors = tuple[Tensor, Tensor]  # of images (N, d) and of captions (C, T, d)


class Pairs(NamedTuple):
    """Labeled images and the captions of each class: the first captions name it, the others only its superclass."""

    images: Tensor  # (N, ...), what the image tower reads
    labels: Tensor  # (N,) int64
    texts: Tensor  # (C, T, ...), what the text tower reads
    weights: Tensor  # (T,), of a pair with this caption


class Towers(nn.Module):
    """Two networks whose outputs for an image and its caption should be near, and the inverse temperature."""

    def __init__(self, image: nn.Module, text: nn.Module):
        super().__init__()
        self.image, self.text = image, text
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @torch.no_grad()
    def vectors(self, images: Tensor, texts: Tensor) -> Vectors:
        """Return the embeddings of images ``(N, ...)`` and captions ``(C, T, ...)``, not normalized."""
        self.eval()
        return self.image(images), torch.stack([self.text(of_class) for of_class in texts])


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor, pair_weights: Tensor | None = None) -> Tensor:
    """Return CLIP's loss of B pairs: the cross-entropy of finding each one's partner, in both directions, a scalar.

    It normalizes its inputs, so within `mrl.MatryoshkaLoss` every prefix is normalized separately.

    Args:
        images, texts: ``(B, d)``.
        scale: What cosines are multiplied by, the inverse temperature.
        pair_weights: ``(B,)``, relative weights of the pairs (generalized contrastive learning); 1 each when None.
    """
    logits = scale * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    partner = torch.arange(len(logits), device=logits.device)
    each = sum(F.cross_entropy(rows, partner, reduction="none") for rows in (logits, logits.T)) / 2
    return each.mean() if pair_weights is None else (pair_weights * each).sum() / pair_weights.sum()  # type: ignore[union-attr]


def tokenize(names: list[str], superclasses: list[str] | None) -> Tensor:
    """Return the captions of each class as tokens ``(C, T, L)``; with superclasses, half of them name only that."""
    from open_clip.tokenizer import SimpleTokenizer

    if superclasses is None:
        texts = [[template.format(name) for template in TEMPLATES] for name in names]
    else:
        kinds = [(f"{name}, a kind of {group}", group) for name, group in zip(names, superclasses, strict=True)]
        texts = [[template.format(what) for what in kind for template in TEMPLATES] for kind in kinds]
    tokens = SimpleTokenizer()([text for of_class in texts for text in of_class])
    tokens = tokens[:, : int((tokens > 0).sum(dim=1).max())]
    # The text tower has rows for tokens that occur. The end of a text, where it is read, is still the largest token.
    return torch.unique(tokens, return_inverse=True)[1].view(len(names), len(texts[0]), -1)


def train(towers: Towers, pairs: Pairs, loss_fn: nn.Module, lr: float, steps: int, batch_size: int) -> Towers:
    """Train with AdamW and a warm-up followed by half a cosine.

    A batch has one image each of ``batch_size`` classes, so that no caption is true of another image of the batch.
    """
    optimizer = torch.optim.AdamW(towers.parameters(), lr=lr, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / (0.1 * steps)) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    order, counts = pairs.labels.argsort(stable=True), torch.bincount(pairs.labels)
    starts, present = counts.cumsum(0) - counts, counts.nonzero()[:, 0]
    towers.train()
    for _ in range(steps):
        classes = present[torch.randperm(len(present))[:batch_size]]
        images = order[starts[classes] + (torch.rand(len(classes)) * counts[classes]).long()]
        captions = torch.randint(pairs.texts.shape[1], classes.shape)
        z, t = towers.image(pairs.images[images]), towers.text(pairs.texts[classes, captions])
        scale = towers.log_scale.clamp(max=math.log(100)).exp()
        loss = loss_fn(z, t, scale=scale, pair_weights=pairs.weights[captions])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return towers


def compare(
    pairs: Pairs,
    images: Tensor,
    dims: tuple[int, ...],
    rates: dict[str, float],
    weights: list[float] | None,
    seed: int,
    **how: Any,
) -> dict[str, dict[int, Vectors]]:
    """Train every method on ``pairs``; return its vectors of ``images`` and of all captions, by dim."""
    from open_clip.transformer import TextTransformer

    def loss_at(dims: tuple[int, ...], weights: list[float] | None = None) -> mrl.MatryoshkaLoss:
        return mrl.MatryoshkaLoss(contrastive_loss, dims, weights)

    def new_towers() -> Towers:
        torch.manual_seed(seed)
        num_features, num_tokens, length = pairs.images.shape[1], int(pairs.texts.max()) + 1, pairs.texts.shape[-1]
        image = nn.Sequential(nn.LayerNorm(num_features), nn.Linear(num_features, dims[-1]))
        return Towers(image, TextTransformer(length, num_tokens, width=64, heads=4, layers=2, output_dim=dims[-1]))

    def prefixes(towers: Towers) -> dict[int, Vectors]:
        z, t = towers.vectors(images, pairs.texts)
        return {dim: (z[:, :dim], t[..., :dim]) for dim in dims}

    plain = {
        lr: train(new_towers(), pairs, loss_at(dims[-1:]), lr, **how) for lr in {rates["truncated"], rates["projected"]}
    }
    lr, towers = rates["projected"], plain[rates["projected"]]
    (z, t), (z_tested, _) = (towers.vectors(each, pairs.texts) for each in (pairs.images, images))
    projected = {}
    for dim in dims:
        maps = Towers(*(nn.Linear(dims[-1], dim, bias=False) for _ in range(2)))
        train(maps, pairs._replace(images=z, texts=t), loss_at((dim,)), lr, **how)
        projected[dim] = maps.vectors(z_tested, t)
    nested = train(new_towers(), pairs, loss_at(dims, weights), rates["nested"], **how)
    return {"nested": prefixes(nested), "truncated": prefixes(plain[rates["truncated"]]), "projected": projected}


def score(images: Tensor, texts: Tensor, labels: Tensor, classes: Tensor) -> tuple[float, float]:
    """Return zero-shot top-1 and nDCG@10 of the images ``(N, d)`` of ``classes``, among these classes.

    A class is the mean of its unit captions that name it. nDCG@10 is of images, with a class as the query.
    """
    chosen = torch.isin(labels, classes)
    queries = F.normalize(texts[classes, : len(TEMPLATES)], dim=-1).mean(dim=1)
    cosines = F.normalize(images[chosen], dim=-1) @ F.normalize(queries, dim=-1).T
    truth = labels[chosen][:, None] == classes
    top_1 = truth[torch.arange(len(truth)), cosines.argmax(dim=1)].float().mean().item()
    return top_1, float(ndcg_score(truth.T.numpy(), cosines.T.numpy(), k=10))


def load_features(args: argparse.Namespace) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """Return the backbone's embeddings of the center crops ``(N, F)``, labels by split, and class names."""
    backbone = build_backbone(args.backbone, args.weights)
    data = DataConfig(name="folder", root=args.data, val_share=0.2, **images_of_weights(args.backbone, args.weights))
    if args.px:
        resize_px = round(args.px * data.eval_resize_px / data.eval_px)
        data = dataclasses.replace(data, train_px=args.px, eval_px=args.px, eval_resize_px=resize_px)
    config = Config(data=data, model=ModelConfig(backbone=args.backbone, init=args.weights, trainable="head"))
    process = distributed.Process(0, 1, torch.device("cpu"))
    images = build_data(data, seed=0, device=process.device)
    network = build_model(backbone, len(images["train"].classes))
    freeze(network, "head")
    cache = TrunkCache(network, config, args.features, "fp32", process)
    features = {split: torch.tensor(CachedImages(cache, split, images[split]).center()) for split in ("train", "val")}
    return features, {split: images[split].labels for split in images}, images["train"].classes


def words_of(classes: list[str], path: Path | None) -> tuple[list[str], list[str] | None]:
    """Return the name and, from the table ``path``, the superclass of each class."""
    names = {name: name for name in classes} if path is None else read_class_table(path, "name")
    if missing := sorted(set(classes) - names.keys()):
        raise mrl.UserError(f"--words {path} has no line for class {missing[0]!r}")
    superclass = read_class_table(path, "superclass") if path else {}
    groups = [superclass[name].replace("_", " ") for name in classes] if path else None
    return [names[name].replace("_", " ") for name in classes], groups


def run(args: argparse.Namespace) -> None:
    """Compute the features, choose the learning rates, and print the tables."""
    if importlib.util.find_spec("open_clip") is None:
        raise mrl.UserError("examples.clip needs open_clip's text transformer: pip install open_clip_torch")
    start = time.perf_counter()
    features, labels, classes = load_features(args)
    took = time.perf_counter() - start
    if len(classes) < 10:
        raise mrl.UserError(f"--data {args.data} has {len(classes)} classes; needed are 10, to hold out every fifth")
    names, groups = words_of(classes, args.words)
    texts, dims = tokenize(names, groups), tuple(args.dims)
    caption_weights = torch.ones(texts.shape[1])
    caption_weights[len(TEMPLATES) :] = args.group_weight
    how = {"steps": args.steps, "batch_size": args.batch_size}
    held_out = torch.arange(len(classes)) % 5 == 4
    seen, unseen = (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]
    of_seen = ~held_out[labels["train"]]
    train_images, train_labels = features["train"][of_seen], labels["train"][of_seen]
    print(f"{len(train_labels):,} images of {len(seen)} classes; held out: {', '.join(names[c] for c in unseen)}")
    print(f"features of {sum(map(len, features.values())):,} images: {took:.0f} s", flush=True)

    in_slice = torch.arange(len(train_labels)) % 5 == 0
    part = Pairs(train_images[~in_slice], train_labels[~in_slice], texts, caption_weights)
    means: dict[str, dict[float, float]] = {method: {} for method in METHODS}
    for lr in args.lrs if len(args.lrs) > 1 else ():
        found = compare(part, train_images[in_slice], dims, dict.fromkeys(METHODS, lr), args.dim_weights, seed=0, **how)
        for method, by_dim in found.items():
            top_1 = [score(*vectors, train_labels[in_slice], seen)[0] for vectors in by_dim.values()]
            means[method][lr] = sum(top_1) / len(top_1)
            print(f"lr {lr:g}, {method}: top-1 {100 * means[method][lr]:.2f}, mean over dims, on the slice", flush=True)
    rates = {method: max(args.lrs, key=lambda lr: means[method].get(lr, 0)) for method in METHODS}

    # The validation images, and those of held-out classes in the training set.
    images = torch.cat([features["val"], features["train"][~of_seen]])
    all_labels = torch.cat([labels["val"], labels["train"][~of_seen]])
    pairs = Pairs(train_images, train_labels, texts, caption_weights)
    values: dict[tuple[str, str], list[list[float]]] = {}
    for seed in args.seeds:
        for method, by_dim in compare(pairs, images, dims, rates, args.dim_weights, seed=seed, **how).items():
            for kind, among in (("images of seen classes", seen), ("held-out classes", unseen)):
                scores = [score(*vectors, all_labels, among) for vectors in by_dim.values()]
                for metric, of_metric in zip(("top-1", "nDCG@10"), zip(*scores, strict=True), strict=True):
                    values.setdefault((f"{metric}, {kind}", method), []).append(list(of_metric))
    for title in dict.fromkeys(title for title, _ in values):
        print(f"\n{title} (%)\n\n| method | lr | {' | '.join(map(str, dims))} |\n{'| --- ' * (len(dims) + 2)}|")
        for method in METHODS:
            of_seeds = 100 * np.array(values[title, method])
            stds = of_seeds.std(axis=0, ddof=1) if len(of_seeds) > 1 else np.zeros(len(dims))
            cells = [f"{mean:.1f} ± {std:.1f}" for mean, std in zip(of_seeds.mean(axis=0), stds, strict=True)]
            print(f"| {method} | {rates[method]:g} | {' | '.join(cells)} |")
    print(f"\nchance: top-1 {100 / len(seen):.1f} of seen, {100 / len(unseen):.1f} of held-out classes")
    if groups:
        number = [sum(groups[other] == groups[c] for other in unseen) for c in unseen]
        print(f"knowing the superclass alone: top-1 {100 * np.mean([1 / n for n in number]):.1f} of held-out classes")
    minutes, busy = (time.perf_counter() - start) / 60, time.process_time() / 60
    print(f"{len(args.seeds)} seeds; {minutes:.1f} min in all, {busy:.1f} min of processor time")


def main(argv: list[str] | None = None) -> int:
    """Run the example from a command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add: Any = parser.add_argument
    add("--data", metavar="DIR", required=True, help="folder of class folders, or with train/ and val/ of such")
    add("--words", type=Path, metavar="TSV", help="a table with the columns class, name and superclass")
    add("--backbone", default="tf_efficientnet_lite0", help="a timm model; default: tf_efficientnet_lite0")
    add("--weights", default="pretrained", help="pretrained, or a weights file; default: pretrained (downloaded)")
    add("--px", type=int, help="side of the images in pixels; default: that of the weights")
    add("--features", type=Path, default=Path("runs/clip_features"), help="where the backbone's outputs are stored")
    add("--dims", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256], help="prefix sizes; the last is the width")
    add("--dim_weights", type=float, nargs="+", help="relative weight of each dim's loss; default: 1")
    add("--group_weight", type=float, default=1.0, help="weight of a pair whose caption names only the superclass")
    add("--lrs", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2], help="learning rates to choose from")
    add("--steps", type=int, default=400, help="training steps; default: 400")
    add("--batch_size", type=int, default=64, help="pairs per step, of different classes; default: 64")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    args = parser.parse_args(argv)
    return distributed.run(lambda: run(args), "stopped; computed features are kept")


if __name__ == "__main__":
    sys.exit(main())
