"""A Vespa application that searches a prefix in memory and re-ranks with the full vectors, which stay on disk.

Writing it needs no server. It was tested without one: see docs/export.md.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch

from mrl.errors import UserError
from mrl.matryoshka import unit_prefix
from mrl.retrieval.search import check_ids
from mrl.rundir import atomic_write, atomic_write_text

MAX_HITS = 400  # Vespa's own limit for one answer
COSINE = "cosine_similarity(query(q), attribute(embedding), x)"
UNPACKED = "sum(query(q_prefix) * (2 * unpack_bits(attribute(bits)) - 1))"


def write_application(
    folder: str | Path,
    vectors: np.ndarray,
    prefix_dim: int,
    ids: Sequence[str] | None = None,
    code: Literal["float32", "sign bits"] = "float32",
) -> None:
    """Write the package (application/), the documents (feed.jsonl), and what `query_body` needs (query.json).

    The prefix has an HNSW index in memory; the full vectors have no index and are paged from disk. Document
    ``id:image:image::i`` holds ``vectors[i]``.

    Args:
        folder: Created if necessary; these three are replaced.
        vectors: ``(N, D)`` of any length; may be memory-mapped.
        ids: N names, returned with the hits.
        code: "sign bits" stores of each coordinate of the unit prefix only whether it is above the mean of the vectors.

    Raises:
        UserError: pyvespa is missing, ``prefix_dim`` or ``ids`` do not fit, or a vector holds NaN or infinity.
    """
    try:
        from vespa.package import HNSW, ApplicationPackage, Document, Field, RankProfile, Schema, SecondPhaseRanking
    except ImportError as error:
        raise UserError("a Vespa application needs pyvespa: pip install pyvespa") from error
    if code not in ("float32", "sign bits") or (code == "sign bits" and prefix_dim % 8):
        raise UserError(f"code is {code!r}; allowed: 'float32', or 'sign bits' if prefix_dim is a multiple of 8")
    check_ids(ids, vectors)
    width = vectors.shape[1]
    prefixes = unit_prefix(torch.tensor(vectors[:, :prefix_dim]), prefix_dim).numpy()
    mean = prefixes.mean(axis=0) if code == "sign bits" else None

    def feed(file: IO[bytes]) -> None:
        for i, vector in enumerate(vectors):
            if not np.isfinite(vector.astype(np.float32)).all():
                raise UserError(f"vector {i} holds NaN or infinity")
            searched = {"prefix": _hex(prefixes[i])} if mean is None else {"bits": _pack(prefixes[i] - mean).hex()}
            tensors = {key: {"values": value} for key, value in (searched | {"embedding": _hex(vector)}).items()}
            document = {"put": f"id:image:image::{i}", "fields": {"name": str(i) if ids is None else ids[i]} | tensors}
            file.write(json.dumps(document).encode() + b"\n")

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "feed.jsonl", feed)
    inputs = [("query(q)", f"tensor<float>(x[{width}])"), ("query(q_prefix)", f"tensor<float>(x[{prefix_dim}])")]
    name, index, reorder = "prefix", HNSW("angular"), None
    if mean is not None:
        inputs.append(("query(q_bits)", f"tensor<int8>(x[{prefix_dim // 8}])"))
        name, index, reorder = "bits", HNSW("hamming"), SecondPhaseRanking(UNPACKED)
    fields = [
        Field("name", "string", ["summary", "attribute"]),
        Field(name, inputs[-1][1], ["attribute", "index"], ann=index),
        Field("embedding", inputs[0][1], ["attribute"], attribute=["paged", "distance-metric: angular"]),
    ]
    closest = f"closeness(field, {name})"
    profiles = [
        RankProfile("exact", "closeness(field, embedding)", inputs=inputs),
        RankProfile("prefix", closest, inputs=inputs, second_phase=reorder),
        RankProfile("rerank", closest, inputs=inputs, second_phase=SecondPhaseRanking(COSINE)),
    ]
    schema = Schema("image", Document(fields), rank_profiles=profiles)
    ApplicationPackage("images", [schema], create_query_profile_by_default=False).to_files(folder / "application")
    settings = {"width": width, "prefix_dim": prefix_dim, "mean": None if mean is None else mean.tolist()}
    atomic_write_text(folder / "query.json", json.dumps(settings) + "\n")


def query_body(
    folder: str | Path,
    query: np.ndarray,
    k: int = 10,
    profile: Literal["exact", "prefix", "rerank"] = "rerank",
    shortlist_size: int = 100,
) -> dict[str, Any]:
    """Return the JSON that asks Vespa for the ``k`` nearest neighbors of ``query`` ``(D,)``.

    Args:
        folder: As `write_application` wrote it.
        profile: "exact" compares all full vectors, "prefix" the stored prefixes; "rerank" orders a shortlist of
            "prefix" by the cosine of the full vectors. With sign bits the shortlist is by Hamming distance, and
            "prefix" orders it by the inner product of the query and the bits.
        shortlist_size: Hits of the first phase on each node.

    Raises:
        UserError: The profile is unknown, the query does not fit, or Vespa would not return ``k`` hits.
    """
    settings = json.loads((Path(folder) / "query.json").read_text())
    if profile not in ("exact", "prefix", "rerank"):
        raise UserError(f"profile is {profile!r}; allowed: exact, prefix, rerank")
    if query.shape != (settings["width"],) or not np.isfinite(query.astype(np.float32)).all():
        raise UserError(f"the query is {query.shape}; allowed: ({settings['width']},), without NaN or infinity")
    if not 1 <= k <= min(shortlist_size, MAX_HITS):
        raise UserError(f"k is {k}; allowed: 1 to the smaller of shortlist_size {shortlist_size} and {MAX_HITS}")
    searched = unit_prefix(torch.tensor(query), settings["prefix_dim"]).numpy()
    field, name, inputs = "prefix", "q_prefix", {"q": query.astype(np.float32).tolist()}
    if settings["mean"] is not None:
        searched -= np.array(settings["mean"], np.float32)
        field, name = "bits", "q_bits"
        inputs["q_bits"] = np.frombuffer(_pack(searched), np.int8).tolist()
    inputs["q_prefix"] = searched.tolist()
    if profile == "exact":
        field, name = "embedding", "q"
    return {
        "yql": f"select name from image where {{targetHits:{shortlist_size}}}nearestNeighbor({field}, {name})",
        "hits": k,
        "ranking.profile": profile,
        "ranking.rerankCount": shortlist_size,
        **{f"input.query({key})": value for key, value in inputs.items()},
    }


def _hex(vector: np.ndarray) -> str:
    """Return float32 numbers as Vespa reads them without rounding: 8 hexadecimal digits each."""
    return vector.astype(">f4").tobytes().hex()


def _pack(centered: np.ndarray) -> bytes:
    """Return a bit for each coordinate, 1 if it is positive; the first is the highest bit of the first byte."""
    return np.packbits(centered > 0).tobytes()
