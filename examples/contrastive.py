"""Train nested embeddings without labels: two crops of an image should be neighbors at every prefix dim.

    python -m examples.contrastive                                   # handwritten digits, CPU, about a minute
    python -m examples.contrastive --images DIR --px 64 --epochs 20  # DIR/train/<class>/ and DIR/val/<class>/

`mrl.MatryoshkaLoss` wraps an ordinary loss on pairs of embeddings (InfoNCE, as in SimCLR and CLIP). Classes are used
only to score the result: is the nearest training image of a validation image of its class?
"""

from __future__ import annotations

import argparse
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mrl
from mrl import distributed
from mrl.config import DataConfig
from mrl.data import Images, build_data
from mrl.data.transforms import eval_indices, train_indices
from mrl.matryoshka import default_nesting_list
from mrl.model import build_backbone

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def info_nce(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Return the cross-entropy of finding each embedding's partner in the batch, in both directions, a scalar.

    It normalizes its inputs, so within `MatryoshkaLoss` every prefix is normalized separately.
    """
    cosines = F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).T
    partner = torch.arange(len(first), device=first.device)
    return (F.cross_entropy(cosines / temperature, partner) + F.cross_entropy(cosines.T / temperature, partner)) / 2


@torch.no_grad()
def embed(network: nn.Module, images: Images) -> Tensor:
    """Return the raw embeddings ``(N, D)`` of a split."""
    network.eval()
    return torch.cat([network(batch).cpu() for batch, _ in images.eval_batches(eval_indices(len(images), 256))])


def one_nn(network: nn.Module, images: dict[str, Images], dims: tuple[int, ...]) -> str:
    """Return the share of validation images whose nearest training image is of their class, by dim, as text."""
    found = mrl.exact_search(embed(network, images["val"]), embed(network, images["train"]), k=1, dims=dims)
    labels, truth = images["train"].labels.numpy(), images["val"].labels.numpy()
    return ", ".join(f"{(labels[nearest[:, 0]] == truth).mean():.4f} @{dim}" for dim, (nearest, _) in found.items())


def main() -> int:
    """Train from a command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", metavar="DIR", help="folder with train/ and val/; default: handwritten digits")
    parser.add_argument("--px", type=int, default=32, help="side of the images in pixels; default: 32")
    parser.add_argument("--backbone", default="resnet10t", help="a timm model; default: resnet10t")
    parser.add_argument("--epochs", type=int, default=10, help="passes over the training images; default: 10")
    parser.add_argument("--batch_size", type=int, default=128, help="pairs per step; default: 128")
    args = parser.parse_args()
    return distributed.run(lambda: pair_crops(args), "stopped")


def pair_crops(args: argparse.Namespace) -> None:
    """Train on pairs of crops; print the 1-NN accuracy before and after."""
    torch.manual_seed(0)
    data = DataConfig(
        name="folder" if args.images else "digits",
        root=args.images,
        backend="memory",
        batch_size=args.batch_size,
        train_px=args.px,
        crop_scale=(0.3, 1.0),
        flip=args.images is not None,  # not for digits: mirrored ones are no longer digits
        eval_resize_px=args.px,
        eval_px=args.px,
    )
    images = build_data(data, seed=0, device=DEVICE)
    network = build_backbone(args.backbone).to(DEVICE)
    width: int = network.head_hidden_size  # type: ignore[assignment]
    dims = default_nesting_list(width)
    loss_fn = mrl.MatryoshkaLoss(info_nce, dims)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.05)
    print(f"1-NN before: {one_nn(network, images, dims)}", flush=True)
    for epoch in range(args.epochs):
        network.train()
        indices = train_indices(len(images["train"]), args.batch_size, 0, epoch)
        # Crops depend on image and epoch only, so the same indices in two epochs give two crops of the same images.
        views = (images["train"].train_batches(indices, 2 * epoch + view, args.px) for view in (0, 1))
        total = 0.0
        for (first, _), (second, _) in zip(*views, strict=True):
            embeddings = network(torch.cat([first, second]))
            loss = loss_fn(*embeddings.chunk(2), temperature=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        print(f"epoch {epoch + 1}: loss {total / len(indices) / len(dims):.3f} per dim", flush=True)
    print(f"1-NN after: {one_nn(network, images, dims)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
