"""Names of megatron-core's options, read from its source text: importing it costs seconds, and torch.

So a misspelt field is told at once, with everything else that is wrong with a recipe. Types and meaning are
megatron-core's own business, when it is there (`settings`).
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from dsplugins.contracts import EnvironmentUnfit, Problem
from dsplugins.typed import unknown
from dsplugins.words import Verbatim

SOURCES = {
    "model": ("MLATransformerConfig", ("model_parallel_config.py", "transformer/transformer_config.py")),
    "optimizer": ("OptimizerConfig", ("optimizer/optimizer_config.py",)),
    "ddp": ("DistributedDataParallelConfig", ("distributed/distributed_data_parallel_config.py",)),
}
"""Section of a recipe -> the dataclass that it fills, and the files with it and what it inherits from."""
OURS = {"model": ("vocab_size",)}
"""Keys of such a section that are no field of the dataclass."""


def unknown_fields(sections: Mapping[str, Mapping[str, Any]]) -> Iterator[Problem]:
    """A problem for each key of a recipe's Megatron sections that megatron-core has no field for."""
    for section, (name, _) in SOURCES.items():
        known = known_fields(section)
        for key in sections.get(section, {}):
            if key not in known:
                yield unknown(key, known, section, f"megatron-core's {name}")


def known_fields(section: str) -> frozenset[str]:
    """What a section may hold: megatron-core's fields and ours."""
    return field_names(section).union(OURS.get(section, ()))


def field_names(section: str) -> frozenset[str]:
    """Fields of a section's dataclass, inherited ones too. Raises EnvironmentUnfit without megatron-core."""
    return frozenset(defaults(section))


@cache
def defaults(section: str) -> Mapping[str, Any]:
    """Field of a section's dataclass, inherited ones too -> its default, as the source text has it.

    Raises EnvironmentUnfit without megatron-core.
    """
    wanted, files = SOURCES[section]
    found = importlib.util.find_spec("megatron")
    classes: dict[str, ast.ClassDef] = {}
    for root in found.submodule_search_locations or () if found else ():
        for file in files:
            path = Path(root) / "core" / file
            tree = ast.parse(path.read_text() if path.exists() else "")
            classes |= {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    if wanted not in classes:
        raise EnvironmentUnfit(
            "megatron-core is not installed here, or not in a version that dsplugins knows, and a recipe is "
            "checked against its fields: pip install 'megatron-core>=0.19.2,<0.20', or see dsplugins doctor"
        )
    return dict(_fields(wanted, classes))


def _fields(name: str, classes: Mapping[str, ast.ClassDef]) -> Iterator[tuple[str, Any]]:
    for base in classes[name].bases:
        if isinstance(base, ast.Name) and base.id in classes:
            yield from _fields(base.id, classes)
    for statement in classes[name].body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            yield statement.target.id, _default(statement.value)


def _default(expression: ast.expr | None) -> Any:
    if expression is None:
        return Verbatim("none: it must be given")
    try:
        return ast.literal_eval(expression)
    except ValueError:
        return Verbatim(ast.unparse(expression))


__all__ = ["SOURCES", "defaults", "field_names", "known_fields", "unknown_fields"]
