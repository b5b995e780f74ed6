"""From a recipe and a command line to a `Config`, and back to a file."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from mrl.config import Config
from mrl.errors import UserError

RECIPES = Path(__file__).resolve().parent.parent / "configs"


def _parser(description: str) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    usage = "train.py [--config RECIPE] [--section.key VALUE ...]"
    parser = ArgumentParser(
        prog="train.py", usage=usage, description=description, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="a YAML recipe: a path, or a name in configs/")
    for section in dataclasses.fields(Config):
        parser.add_class_arguments(section.default_factory, section.name)
    return parser


def _parse(description: str, words: Sequence[str]) -> Config:
    parser = _parser(description)
    try:
        namespace = parser.instantiate(parser.parse_args(words))
    except ArgumentError as error:
        raise UserError(_sentence(str(error))) from error
    return Config(**{section.name: namespace[section.name] for section in dataclasses.fields(Config)})


def _sentence(message: str) -> str:
    """A parser's message on one line, with the keys that an unknown one may stand for."""
    known = [f"{section.name}.{f.name}" for section in dataclasses.fields(Config) for f in _fields_of(section)]
    unknown = re.search(r"(?:arguments: --|Key '|[Oo]ption ')([\w.]+).*", message)
    close = difflib.get_close_matches(unknown[1], known, n=3, cutoff=0.5) if unknown else []
    return " ".join(message.split()) + (f"; did you mean {' or '.join(close)}?" if close else "")


def _fields_of(section: dataclasses.Field) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(section.default_factory)  # type: ignore[arg-type]


def find_recipe(name: str) -> str:
    """The path of a recipe given as a path or as a name in ``configs/``, with or without ``.yaml``.

    Raises:
        UserError: There is no such file; the message lists the recipes there are.
    """
    for path in (Path(name), RECIPES / name, RECIPES / f"{name}.yaml"):
        if path.is_file():
            return str(path)
    known = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml"))) or "none"
    raise UserError(f"--config {name!r} is neither a file nor a recipe in {RECIPES}; recipes: {known}")


def _find_recipes(argv: Sequence[str]) -> list[str]:
    found = list(argv)
    for i, word in enumerate(found):
        if word.startswith("--config="):
            found[i] = "--config=" + find_recipe(word.removeprefix("--config="))
        elif word == "--config" and i + 1 < len(found):
            found[i + 1] = find_recipe(found[i + 1])
    return found


def parse_command_line(argv: Sequence[str] | None, description: str) -> Config:
    """The `Config` of ``--config recipe.yaml --section.key value ...``; later words win.

    Raises:
        UserError: There is no such recipe, a key is unknown, a value has the wrong type or is
            impossible; the sentence names the dotted key and what is allowed.
    """
    return _parse(description, _find_recipes(sys.argv[1:] if argv is None else argv))


def read_config(path: str | Path) -> Config:
    """The `Config` in a YAML file such as a run directory's config.yaml.

    Raises:
        UserError: There is no such file, or as `parse_command_line`.
    """
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist, so there is no run configuration to read")
    return _parse("", ["--config", str(path)])


def to_yaml(config: Config) -> str:
    """Every field of ``config`` as YAML, defaults included."""
    # By way of JSON, which knows lists but no tuples.
    return yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(config))), sort_keys=False)
