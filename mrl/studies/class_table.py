"""Tables that say something of each class: its superclass, or what it is called elsewhere."""

from __future__ import annotations

import csv
from pathlib import Path

from mrl.errors import UserError


def read_class_table(path: str | Path, column: str) -> dict[str, str]:
    """``{class: its entry in column}`` of a tab-separated table whose first line names its columns.

    The first column is the class as its folder is called.

    Raises:
        UserError: The file is missing, lacks the column, or a class has no entry or two different ones.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a table whose columns are the class and its {column}")
    with path.open(encoding="utf-8", newline="") as file:
        header, *lines = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)) or [[]]
    if column not in header[1:]:
        raise UserError(f"{path} has the columns {header}; needed are the class first and one called {column}")
    position = header.index(column, 1)
    table: dict[str, str] = {}
    for number, line in enumerate(lines, 2):
        if not line:
            continue
        entry = line[position].strip() if len(line) > position else ""
        if not entry or table.setdefault(line[0], entry) != entry:
            raise UserError(f"{path}, line {number}: {line[0]!r} needs one {column}, and the same wherever it stands")
    return table
