"""What an installed library offers, read from its source: importing it may take a GPU, and seconds."""

from __future__ import annotations

import ast
import importlib.util
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Parameters:
    """Names that a function takes, without `self`."""

    required: frozenset[str]
    all: frozenset[str]


def source(package: str, path: str) -> str | None:
    """The text of a file of a top-level package that is installed; None where there is no such file."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (file := Path(folder, path)).is_file():
            return file.read_text()
    return None


def parameters(text: str, name: str) -> Parameters | None:
    """Those of the function `f` or the method `Class.f` of a module's text; None where it has none."""
    scope: list[ast.stmt] = ast.parse(text).body
    node: ast.stmt | None = None
    for part in name.split("."):
        node = next((found for found in scope if getattr(found, "name", None) == part), None)
        scope = getattr(node, "body", [])
    if not isinstance(node, ast.FunctionDef):
        return None
    given = node.args
    positional = [argument.arg for argument in (*given.posonlyargs, *given.args)]
    optional = set(positional[len(positional) - len(given.defaults) :])
    keywords = [argument.arg for argument in given.kwonlyargs]
    optional |= {k for k, default in zip(keywords, given.kw_defaults, strict=True) if default is not None}
    names = {*positional, *keywords} - {"self"}
    return Parameters(frozenset(names - optional), frozenset(names))


__all__ = ["Parameters", "parameters", "source"]
