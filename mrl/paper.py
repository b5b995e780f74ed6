"""The paper's own numbers as rows, to be drawn beside ours, and its superclasses.

The facts, each with its source, stand in paper.yaml and superclasses.yaml.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from typing import Any

import yaml

from mrl.errors import UserError
from mrl.results import Row, Source

RUN = "paper"
DATASET = "imagenet"


def paper_rows(dataset: str, *tables: str) -> list[Row]:
    """Rows of run "paper", of ``dataset``; none unless that is "imagenet", for the paper's numbers are of no other.

    Args:
        dataset: Name of the data that ours are of.
        tables: Which of table_1, table_2, table_8, table_11, table_22, table_22_never, table_25, figure_5 and
            figure_6; all when none is named.

    Raises:
        UserError: A table is not among them.
    """
    facts: dict[str, dict[str, Any]] = yaml.safe_load(
        (resources.files("mrl") / "paper.yaml").read_text(encoding="utf-8")
    )
    unknown = [name for name in tables if name not in facts]
    if unknown:
        raise UserError(f"of the paper, {', '.join(unknown)} is not kept; allowed: {', '.join(facts)}")
    if dataset != DATASET:
        return []
    return [row for name in tables or facts for row in _rows(facts[name])]


def paper_superclasses() -> dict[str, str]:
    """``{WordNet id: superclass}`` of the 467 ImageNet classes that belong to the paper's 30 superclasses."""
    text = (resources.files("mrl") / "superclasses.yaml").read_text(encoding="utf-8")
    facts: dict[str, str] = yaml.safe_load(text)
    return {wnid: superclass for superclass, wnids in facts.items() for wnid in wnids.split()}


def _rows(table: dict[str, Any]) -> Iterator[Row]:
    # One training run, its seed not stated; Resize 256, center crop 224.
    source = Source(DATASET, RUN, seed=0, resize_px=256, crop_px=224, flip=table["flip"])
    for method, facts in table["rows"].items():
        for value, rest in _points(table, facts):
            if value is not None:
                yield source.row(table["study"], method, table["metric"], value / 100, table["n"], **rest)


def _points(table: dict[str, Any], facts: dict[str, Any]) -> Iterator[tuple[float | None, dict[str, Any]]]:
    """Each value in percent, and the fields of its row that differ from point to point."""
    if "points" in facts:
        for shortlist_dim, rerank_dim, cost, value in facts["points"]:
            sizes = {"shortlist_dim": shortlist_dim, "rerank_dim": rerank_dim, "cost": cost}
            yield value, sizes | {"shortlist_size": table["shortlist_size"]}
        return
    both = table | facts
    columns = {
        key: both[name] for key, name in (("dim", "dims"), ("cost", "cost"), ("expected_dim",) * 2) if name in both
    }
    for i, value in enumerate(facts["values"]):
        yield value, {key: column[i] for key, column in columns.items()}
