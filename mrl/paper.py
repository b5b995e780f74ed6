"""The paper's numbers as rows to draw beside ours, and its superclasses; paper.yaml and superclasses.yaml hold them."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from typing import Any

import yaml

from mrl.results import Row, Source

RUN = "paper"
DATASET = "imagenet"


def paper_rows(dataset: str, *tables: str) -> list[Row]:
    """Return the rows of run "paper": of the named ``tables`` of paper.yaml, or of all of them.

    The list is empty unless ``dataset`` is "imagenet", the only one that the paper's numbers are of.
    """
    if dataset != DATASET:
        return []
    facts = _read("paper.yaml")
    return [row for name in tables or facts for row in _rows(facts[name])]


def paper_superclasses() -> dict[str, str]:
    """Return ``{WordNet id: superclass}`` of the 467 ImageNet classes in the paper's 30 superclasses."""
    return {wnid: superclass for superclass, wnids in _read("superclasses.yaml").items() for wnid in wnids.split()}


def _read(name: str) -> dict[str, Any]:
    return yaml.safe_load((resources.files("mrl") / name).read_text(encoding="utf-8"))


def _rows(table: dict[str, Any]) -> Iterator[Row]:
    # The paper trained each model once and does not state its seed.
    source = Source(DATASET, RUN, seed=0, resize_px=256, crop_px=224, flip=table["flip"])
    for method, facts in table["rows"].items():
        for value, fields in _points(table | facts):
            if value is not None:
                yield source.row(table["study"], method, table["metric"], value / 100, table["n"], **fields)


def _points(table: dict[str, Any]) -> Iterator[tuple[float | None, dict[str, Any]]]:
    """Yield each value in percent with the fields of its row that differ from point to point."""
    for shortlist_dim, rerank_dim, cost, value in table.get("points", ()):
        size = table["shortlist_size"]
        yield value, dict(shortlist_dim=shortlist_dim, shortlist_size=size, rerank_dim=rerank_dim, cost=cost)
    names = {"dims": "dim", "cost": "cost", "expected_dim": "expected_dim"}
    for i, value in enumerate(table.get("values", ())):
        yield value, {field: table[name][i] for name, field in names.items() if name in table}
