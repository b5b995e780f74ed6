"""Give any stored embedding useful prefixes: fit a linear map to its vectors, without images or a backbone.

    python -m mrl.adapt --vectors train.npy --dims 16 64 256 --out map.safetensors
    python -m mrl.adapt --vectors train.npy --labels labels.npy --out map.safetensors

Vectors are a .npy file (N, D) of any model; labels are (N,). A tenth of the vectors, at most 1,000, is held out to
report what the map changes: 1-NN accuracy, or without labels the share of the 10 nearest neighbors that each prefix
keeps. In Python, mrl.adapt.load(FILE)(vectors) applies the map to vectors of the same model.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor, nn

from mrl import distributed
from mrl.config import expand_home
from mrl.errors import UserError
from mrl.matryoshka import MatryoshkaLoss, NestedLinear, check_nesting_list, default_nesting_list, nested_cross_entropy
from mrl.progress import progress
from mrl.retrieval.embeddings import read_metadata
from mrl.retrieval.search import exact_search
from mrl.rundir import atomic_write

FORMAT = "mrl.adapt 1"
BATCH_SIZE = 512
STEPS = 300
RATE = 0.1
TEMPERATURE = 0.05
SAMPLE = 50_000
BLOCK = 8192
NEIGHBORS = 10
RANDOM_CHOICES = 50
MIN_VECTORS = 20


@dataclass(frozen=True)
class Map:
    """A linear map to an embedding whose prefixes of length ``dims`` are embeddings too."""

    weight: np.ndarray  # (dims[-1], D) float32
    dims: tuple[int, ...]  # the nesting list, ascending

    def __call__(self, vectors: np.ndarray | Tensor) -> np.ndarray:
        """Map ``(N, D)`` of any length to ``(N, dims[-1])`` float32 of length 1. Cut, **then** normalize again.

        Raises:
            UserError: The vectors are not a matrix of width D.
        """
        vectors = vectors.float().numpy(force=True) if isinstance(vectors, Tensor) else vectors
        size, width = self.weight.shape
        if vectors.ndim != 2 or vectors.shape[1] != width:
            raise UserError(f"the map takes vectors (N, {width}), but these are {vectors.shape}")
        mapped = np.empty((len(vectors), size), np.float32)
        for start in range(0, len(vectors), BLOCK):
            block = slice(start, start + BLOCK)
            mapped[block] = unit(unit(vectors[block]) @ self.weight.T)
        return mapped

    def save(self, path: str | Path) -> None:
        """Write the map, which `load` reads."""
        content = save({"weight": self.weight}, {"format": FORMAT, "dims": json.dumps(self.dims)})
        atomic_write(Path(path), lambda file: file.write(content))


def load(path: str | Path) -> Map:
    """Return the map that ``python -m mrl.adapt`` or `Map.save` wrote.

    Raises:
        UserError: The file cannot be read or is not such a map.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            about = file.metadata() or {}
            if about.get("format") == FORMAT:
                return Map(file.get_tensor("weight"), tuple(json.loads(about["dims"])))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as a map of python -m mrl.adapt: {error}") from error
    raise UserError(f"{path} is not a map of python -m mrl.adapt")


def fit(
    vectors: np.ndarray,
    labels: np.ndarray | None = None,
    dims: Sequence[int] | None = None,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    show_progress: bool = False,
) -> Map:
    """Fit a map to ``vectors`` ``(N, D)`` in a number of steps that does not depend on N.

    With ``labels`` ``(N,)``, integers or names, the loss is the nested cross-entropy of one linear classifier per
    prefix; the classifiers are then dropped. Without, each prefix keeps the neighbors of the whole vector; see
    `neighbor_loss`. The map starts from the directions of the largest second moment and takes 300 steps of Adam on 512
    random vectors of length 1, at a learning rate of 0.1 / sqrt(D) that falls linearly to 0.

    Without labels, these settings kept the most neighbors (mean over 8, 32, and 128 dims) in a sweep on one fifth of
    the training vectors, held out: EfficientNet-Lite0 on 47 classes of Caltech-101, N = 1,646, D = 1,280, one seed;
    rates 0.03, 0.1, 0.3 times temperatures 0.03, 0.05, 0.1, then 100 and 1,000 steps at rates 0.03 and 0.1. With
    labels, rates of 0.1 to 1 and 300 or 1,000 steps were within a point and a half of each other. Subtracting the mean
    first kept fewer neighbors; with labels it gained 2.2 points of 1-NN at 8 dims and lost 1.1 at 128 (three splits).
    So the map is one matrix.

    Args:
        dims: Prefix sizes, ascending; halvings of D when None. The map returns the largest.
        seed: Of the vectors of each step and of the classifiers.

    Raises:
        UserError: The vectors are not a finite matrix, or labels or dims do not fit them.
    """
    width, dims = check(vectors, labels, dims)
    rng = np.random.default_rng(seed)
    sample = unit(vectors[np.sort(rng.permutation(len(vectors))[:SAMPLE])])
    components = principal_components(sample, np.zeros(width, np.float32))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        linear = nn.utils.skip_init(nn.Linear, width, dims[-1], bias=False).to(device)
        linear.weight.data = torch.from_numpy(components.T[: dims[-1]].copy()).to(device)
        head, targets = None, np.empty(0, np.int64)
        if labels is not None:
            classes, targets = np.unique(labels, return_inverse=True)
            head = NestedLinear(dims, len(classes)).to(device)
    nested_neighbor_loss = MatryoshkaLoss(neighbor_loss, dims)
    parameters = [*linear.parameters(), *(head.parameters() if head else ())]
    optimizer = torch.optim.Adam(parameters, RATE / math.sqrt(width))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    batch_size = min(BATCH_SIZE, len(vectors))
    with progress(show=show_progress, total=STEPS * batch_size, desc="fitting the map", unit="vector") as bar:
        for _ in range(STEPS):
            chosen = rng.choice(len(vectors), batch_size, replace=False)
            batch = math.sqrt(width) * torch.from_numpy(unit(vectors[chosen])).to(device)
            z = linear(batch)
            if head is None:
                loss = nested_neighbor_loss(z, target=similarities(batch).softmax(dim=1))
            else:
                loss = nested_cross_entropy(head(z), torch.from_numpy(targets[chosen]).to(device)).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update(batch_size)
    return Map(linear.weight.detach().cpu().numpy(), dims)


def check(vectors: np.ndarray, labels: np.ndarray | None, dims: Sequence[int] | None) -> tuple[int, tuple[int, ...]]:
    """Return the width and the nesting list, if a map can be fitted."""
    if vectors.ndim != 2 or vectors.dtype.kind not in "fiu" or len(vectors) < MIN_VECTORS:
        raise UserError(
            f"the vectors are {vectors.shape} {vectors.dtype}; needed is a matrix (N, D) of numbers with N at least "
            f"{MIN_VECTORS}"
        )
    width = vectors.shape[1]
    for start in range(0, len(vectors), BLOCK):
        finite = np.isfinite(vectors[start : start + BLOCK]).all(axis=1)
        if not finite.all():
            raise UserError(f"vector {start + int(finite.argmin())} holds NaN or infinity; leave it out")
    if labels is not None:
        if labels.shape != vectors.shape[:1]:
            raise UserError(f"the labels are {labels.shape}; needed is one for each of the {len(vectors):,} vectors")
        if (labels == labels[0]).all():
            raise UserError(f"all labels are {labels[0]}; needed are two classes or more")
    dims = default_nesting_list(width) if dims is None else check_nesting_list(dims)
    if dims[-1] > width:
        raise UserError(f"dims {list(dims)} ask for {dims[-1]}, but the vectors have only {width}")
    return width, dims


def unit(vectors: np.ndarray) -> np.ndarray:
    """Return vectors ``(N, D)`` at length 1, float32; zero vectors stay zero."""
    vectors = np.asarray(vectors, np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def principal_components(vectors: np.ndarray, center: np.ndarray) -> np.ndarray:
    """Return the directions ``(D, D)`` float32 of the largest second moment of ``vectors`` about ``center``, in order.

    scikit-learn's PCA needs as many images as dims and a copy of the vectors; its TruncatedSVD is approximate and, at
    full width, 100 times slower.
    """
    blocks = np.array_split(vectors, 1 + len(vectors) // BLOCK)
    moment = sum((block - center).T.astype(np.float64) @ (block - center) for block in blocks)
    return np.linalg.eigh(moment).eigenvectors[:, ::-1].astype(np.float32)


def similarities(z: Tensor) -> Tensor:
    """Return the cosines of all pairs of ``z`` ``(B, D)``, divided by the temperature; minus infinity with itself."""
    z = F.normalize(z, dim=1)
    return (z @ z.T / TEMPERATURE).fill_diagonal_(torch.finfo(z.dtype).min)


def neighbor_loss(z: Tensor, *, target: Tensor) -> Tensor:
    """Return the cross-entropy of two distributions over the other vectors of a batch, a softmax of cosines each.

    ``target`` ``(B, B)`` is that of the whole vectors, the other that of the prefix ``z`` ``(B, dim)``. Near vectors
    count most. Summed over prefixes, it keeps neighbors as Matryoshka-Adaptor (Yoon et al., EMNLP 2024) does, which
    compares cosines by their absolute differences.
    """
    return F.cross_entropy(similarities(z), target)


Score = Callable[[Callable[[np.ndarray], np.ndarray], Sequence[int]], list[float]]


def scorer(
    queries: np.ndarray,
    database: np.ndarray,
    query_labels: np.ndarray | None = None,
    database_labels: np.ndarray | None = None,
) -> Score:
    """Return ``score(transform, dims)``: how good the prefixes of transformed vectors are, a number for each dim.

    With labels it is 1-NN accuracy; without, the share of a query's 10 nearest neighbors by whole vectors that are
    among its 10 nearest by prefixes. Queries ``(Q, D)`` and database ``(N, D)`` are raw.
    """
    k, width = (NEIGHBORS, queries.shape[1]) if database_labels is None else (1, 0)
    true = exact_search(queries, database, k, [width])[width][0] if width else None

    def score(transform: Callable[[np.ndarray], np.ndarray], dims: Sequence[int]) -> list[float]:
        found = exact_search(transform(queries), transform(database), k, dims)
        if true is not None:
            return [float((found[dim][0][:, :, None] == true[:, None]).any(axis=2).mean()) for dim in dims]
        return [float((database_labels[found[dim][0][:, 0]] == query_labels).mean()) for dim in dims]  # type: ignore[index]

    return score


def adapt(args: argparse.Namespace) -> None:
    """Hold vectors out, fit, write the map, and print what it changes."""
    out = Path(args.out)
    if out.exists():
        load(out)  # never replace a file of something else
    vectors = read_array(args.vectors)
    labels = read_array(args.labels) if args.labels else None
    _, dims = check(vectors, labels, args.dims)
    order = np.random.default_rng(args.seed).permutation(len(vectors))
    held_out, rest = np.split(order, [min(1000, len(vectors) // 10)])
    rest.sort()
    database = rest[:: math.ceil(len(rest) / SAMPLE)]
    of_labels = () if labels is None else (labels[held_out], labels[database])
    score = scorer(vectors[held_out], vectors[database], *of_labels)
    about = read_metadata(Path(args.vectors).with_suffix(".json"))  # of python -m mrl.embed
    warn_if_nested(score, vectors.shape[1], dims[0], about.trained_dims if about else [])
    of_rest = vectors[rest], None if labels is None else labels[rest]
    mapping = fit(*of_rest, dims, seed=args.seed, device=args.device, show_progress=True)
    mapping.save(out)
    mean = vectors[database].mean(axis=0)
    pca, svd = (principal_components(vectors[database], center)[:, : dims[-1]] for center in (mean, 0 * mean))
    columns = {
        "truncated": score(lambda given: given, dims),
        "PCA": score(lambda given: (given - mean) @ pca, dims),
        "SVD": score(lambda given: given @ svd, dims),
        "map": score(mapping, dims),
    }
    what = f"{NEIGHBORS} nearest neighbors kept (%)" if labels is None else "1-NN accuracy (%)"
    print(f"{what}: {len(held_out):,} vectors that were held out, in a database of {len(database):,}")
    print("  dims" + "".join(f"{name:>11}" for name in columns))
    for dim, *values in zip(dims, *columns.values(), strict=True):
        print(f"{dim:>6}" + "".join(f"{100 * value:>11.1f}" for value in values))
    print(f'{out}: apply it with mrl.adapt.load("{out}")(vectors)')


def warn_if_nested(score: Score, width: int, dim: int, trained: Sequence[int]) -> None:
    """Warn if several dims were ``trained``, or the first ``dim`` coordinates beat 50 random choices of as many others.

    Without labels, only an order such as that of PCA shows: the first numbers of MRL, trained on labels, hardly keep
    more neighbors than others do.
    """
    nested = f"are nested already, at {list(trained)} dims" if len(trained) > 1 else ""
    if not nested and width >= 2 * dim:
        others = np.random.default_rng(0).permuted(np.tile(np.arange(dim, width), (RANDOM_CHOICES, 1)), axis=1)[:, :dim]
        [first] = score(lambda given: given, [dim])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "prefixes are all zero")  # nobody will use these choices
            best = max(score(partial(np.take, indices=chosen, axis=1), [dim])[0] for chosen in others)
        if first > best:
            nested = f"look nested already: their first {dim} numbers score {100 * first:.1f}%, {RANDOM_CHOICES} "
            nested += f"random choices of {dim} others at most {100 * best:.1f}%"
    if nested:
        warnings.warn(f"these vectors {nested}; plain truncation may do", stacklevel=2)


def read_array(path: str) -> np.ndarray:
    """Return the array in a .npy file."""
    try:
        with open(path, "rb") as file:
            return np.lib.format.read_array(file)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read as a .npy file: {error}") from error


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m mrl.adapt", description=__doc__, formatter_class=form, allow_abbrev=False
    )
    parser.add_argument("--vectors", required=True, metavar="FILE.npy", help="vectors (N, D) of one model, any length")
    parser.add_argument("--labels", metavar="FILE.npy", help="their classes (N,), if there are any")
    parser.add_argument("--dims", type=int, nargs="+", help="prefix sizes, ascending; default: halvings of D")
    parser.add_argument("--out", required=True, metavar="FILE.safetensors", help="file for the map")
    parser.add_argument("--seed", type=int, default=0, help="of what is held out and of the fit; default: 0")
    parser.add_argument("--device", default="cpu", help="where to fit; default: cpu")
    args = parser.parse_args(expand_home(argv))
    if not args.out.endswith(".safetensors") or not Path(args.out).resolve().parent.is_dir():
        raise UserError(f"--out is {args.out!r}; allowed: a .safetensors file in an existing folder")
    if args.seed < 0:
        raise UserError(f"--seed is {args.seed}; allowed: 0 or more")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {args.device} cannot be used: {str(error).splitlines()[0]}") from error
    return args


def main(argv: list[str] | None = None) -> int:
    """Fit a map from the command line and return the exit status."""
    return distributed.run(lambda: adapt(parse(argv)), "stopped")


if __name__ == "__main__":
    sys.exit(main())
