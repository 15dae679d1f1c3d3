"""Recipe files -> one Recipe: extends, merge, overrides, and where each value came from.

A recipe is data: no import paths, no resolvers but references `${a.b}` and, for paths under `data` and
`run`, `${oc.env:NAME}`. Every fault is reported with its file and line.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dsplugins.contracts import Problem, RecipeError

SECTIONS = ("model", "parallel", "optimizer", "ddp", "data", "train", "evaluate", "save", "run")
TOP = ("extends", "plugins", *SECTIONS, "init_from")
COMMAND_LINE = "command line"


class Recipe:
    """A recipe, merged with what it extends and with the command line."""

    def __init__(self, path: Path, overrides: Sequence[str]) -> None:
        self.path, self.name, self.overrides = path, path.stem, tuple(overrides)
        self.sources: list[Path] = []
        self._places: dict[str, str] = {}
        problems: list[Problem] = []
        self._readable = True
        merged = self._read(path, (), problems)
        merged = self._override(merged, overrides, problems)
        if not self._readable:
            raise RecipeError(problems)
        self._given = path.read_text()
        self._settle(merged, problems)
        self.problems = tuple(problems)
        """What is wrong with the text itself; `plan.prepare` reports it with everything else."""

    @staticmethod
    def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Read `path`, a file or a shipped recipe's name. Raises RecipeError if it can't be read at all."""
        file = Path(path)
        if not file.exists() and (recipe_folder() / path).exists():
            file = recipe_folder() / path
        return Recipe(file, overrides)

    def _settle(self, merged: DictConfig, problems: list[Problem]) -> None:
        try:
            # A resolver that is not allowed is never called, not even to report it.
            plain: Any = OmegaConf.to_container(merged, resolve=not problems)
        except OmegaConfBaseException as error:
            said, place = str(error).splitlines()[0], f"{_shown(self.path)}:1"
            unknown = Problem(said, "", "references look like ${model.hidden_size}", place)
            raise RecipeError([*problems, unknown]) from None
        named: dict[str, Any] = self._mapping("plugins", plain.get("plugins"), problems)
        self.removed = tuple(name for name, values in named.items() if values is None)
        self.plugins: dict[str, dict[str, Any]] = {
            name: self._mapping(f"plugins.{name}", values, problems)
            for name, values in named.items()
            if values is not None
        }
        self.sections: dict[str, dict[str, Any]] = {
            name: self._mapping(name, plain.get(name), problems) for name in SECTIONS
        }

    def _mapping(self, key: str, value: Any, problems: list[Problem]) -> dict[str, Any]:
        if value is None or isinstance(value, dict):
            return value or {}
        remedy = f"write `{key.split('.')[-1]}: {{}}`"
        problems.append(self.located([Problem(f"{key}={value!r} is not a mapping", key, remedy)])[0])
        return {}

    def _read(self, path: Path, chain: tuple[Path, ...], problems: list[Problem]) -> DictConfig:
        """One file over what it extends; `chain` holds the files that led here."""
        shown, resolved = _shown(path), path.resolve()
        if resolved in chain:
            way = " -> ".join(_shown(p) for p in (*chain[chain.index(resolved) :], resolved))
            self._readable = False
            problems.append(Problem(f"extends goes in a circle: {way}", "extends", "drop one", f"{shown}:1"))
            return OmegaConf.create({})
        root = _parse(path, shown, problems)
        if root is None:
            self._readable = False
            return OmegaConf.create({})
        places: dict[str, str] = {}
        problems += _walk(root, "", shown, places)
        data = yaml.load(yaml.serialize(root), Loader=_Loader)
        merged = OmegaConf.create({})
        known = len(problems)
        bases = list(_extended(data, path, shown, places, problems))
        self._readable &= len(problems) == known
        for base in bases:
            merged = OmegaConf.merge(merged, self._read(base, (*chain, resolved), problems))  # type: ignore[assignment]
        data.pop("extends", None)
        self.sources.append(path)
        self._places.update(places)
        return _merge(merged, data)

    def _override(self, merged: DictConfig, overrides: Sequence[str], problems: list[Problem]) -> DictConfig:
        for text in overrides:
            key, equals, raw = text.partition("=")
            if not equals or not key:
                problems.append(
                    Problem(f"{text!r} is not KEY=VALUE", "", "write train.steps=10", COMMAND_LINE)
                )
                continue
            try:
                value = yaml.load(raw, Loader=_Loader) if raw else None
            except yaml.YAMLError:
                problems.append(Problem(f"{key}: {raw!r} is not YAML", key, "quote it", COMMAND_LINE))
                continue
            faults = [*_top(key.split(".")[0], COMMAND_LINE), *_text_faults(key, value, COMMAND_LINE)]
            if "_target_" in key.split("."):
                said = f"{key}: a recipe is data and can't name code"
                faults.append(Problem(said, key, "name a plugin under plugins:", COMMAND_LINE))
            problems += faults
            if not faults:
                nested: Any = value
                for part in reversed(key.split(".")):
                    nested = {part: nested}
                merged = _merge(merged, nested)
                self._places = {k: v for k, v in self._places.items() if not k.startswith(key + ".")}
                self._places[key] = COMMAND_LINE
        return merged

    def place(self, key: str) -> str:
        """`file:line` or `command line` of a dotted key, or of its nearest parent; "" if nobody wrote it."""
        while key:
            if key in self._places:
                return self._places[key]
            key = key.rpartition(".")[0]
        return ""

    def located(self, problems: Sequence[Problem]) -> list[Problem]:
        """The problems with their places filled in."""
        top = f"{_shown(self.path)}:1"
        return [p if p.place else replace(p, place=self.place(p.key) or top) for p in problems]

    def as_given(self) -> str:
        """The file's own text, with the command line's overrides as comments."""
        return self._given + "".join(f"# command line: {text}\n" for text in self.overrides)

    def resolved(self) -> str:
        """The merged recipe as YAML, without extends."""
        whole = {"plugins": self.plugins, **{k: v for k, v in self.sections.items() if v}}
        return yaml.safe_dump(whole, sort_keys=False)


class _Loader(yaml.SafeLoader):
    """YAML whose floats are YAML 1.2's: 1e-4 is a number, not text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9_]+)(?:[eE][-+]?[0-9]+)?$"),
    list("-+0123456789."),
)
# Integers match the pattern above as well; put theirs first again.
for _first, _resolvers in _Loader.yaml_implicit_resolvers.items():
    _resolvers.sort(key=lambda pair: pair[0] == "tag:yaml.org,2002:float")


def _parse(path: Path, shown: str, problems: list[Problem]) -> yaml.MappingNode | None:
    try:
        text = path.read_bytes().decode("utf-8")
        if "\0" in text:
            raise UnicodeDecodeError("utf-8", b"", 0, 1, "binary")
        root = yaml.compose(text, Loader=_Loader)
    except OSError as error:
        said = f"{shown}: {error.strerror or error}"
        problems.append(
            Problem(said, "", "check the path; `dsplugins recipes` lists the shipped ones", f"{shown}:1")
        )
        return None
    except UnicodeDecodeError:
        problems.append(Problem("is not a text file", "", "give a YAML file", f"{shown}:1"))
        return None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        said = f"is not YAML: {getattr(error, 'problem', None) or error}"
        problems.append(Problem(" ".join(said.split()), "", "mend the line", f"{shown}:{line}"))
        return None
    if not isinstance(root, yaml.MappingNode):
        said = "is empty" if root is None else "is not a mapping"
        problems.append(Problem(said, "", "a recipe starts with KEY: VALUE", f"{shown}:1"))
        return None
    return root


def _walk(node: yaml.MappingNode, prefix: str, shown: str, places: dict[str, str]) -> Iterator[Problem]:
    """Places of all keys below `node`; duplicate keys, `_target_` and resolvers are problems."""
    for key_node, value in node.value:
        name = str(key_node.value)
        key, place = f"{prefix}{name}", f"{shown}:{key_node.start_mark.line + 1}"
        if not prefix:
            yield from _top(name, place)
        if key in places:
            yield Problem(f"{key} is given twice (first at {places[key]})", key, "drop one", place)
        if "." in name:
            yield Problem(f"{key}: a key can't hold a dot", key, "nest it, or rename it", place)
        places[key] = place
        yield from _node_faults(key, name, value, place)
        if isinstance(value, yaml.MappingNode):
            yield from _walk(value, f"{key}.", shown, places)


def _node_faults(key: str, name: str, value: yaml.Node, place: str) -> Iterator[Problem]:
    if name == "_target_":
        yield Problem(
            f"{key}: a recipe is data and can't name code", key, "name a plugin under plugins:", place
        )
    if isinstance(value, yaml.ScalarNode):
        yield from _text_faults(key, value.value, place)
    elif isinstance(value, yaml.SequenceNode):
        for item in value.value:
            yield from _node_faults(key, "", item, f"{place.rpartition(':')[0]}:{item.start_mark.line + 1}")
            if isinstance(item, yaml.MappingNode):
                for inner, content in item.value:
                    yield from _node_faults(key, str(inner.value), content, place)


def _text_faults(key: str, value: Any, place: str) -> Iterator[Problem]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if name == "_target_":
                yield Problem(f"{key}: a recipe is data and can't name code", key, "name a plugin", place)
            yield from _text_faults(f"{key}.{name}", inner, place)
    for call in re.findall(r"\$\{\s*([\w.]+)\s*:", value) if isinstance(value, str) else ():
        if call != "oc.env" or key.split(".")[0] not in ("data", "run"):
            said = f"{key}: the resolver {call} is not allowed"
            yield Problem(said, key, "references ${a.b} are; ${oc.env:NAME} under data and run only", place)


def _top(name: str, place: str) -> Iterator[Problem]:
    if name not in TOP:
        near = difflib.get_close_matches(name, TOP, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"sections: {', '.join(TOP)}"
        yield Problem(f"{name} is not a section of a recipe", name, remedy, place)


def _extended(
    data: Mapping[str, Any], path: Path, shown: str, places: Mapping[str, str], problems: list[Problem]
) -> Iterator[Path]:
    wanted = data.get("extends") or []
    place = places.get("extends", f"{shown}:1")
    if not isinstance(wanted, list):
        problems.append(Problem("extends is not a list", "extends", f"write [{wanted}]", place))
        return
    for name in wanted:
        found = next((p for p in (path.parent / str(name), recipe_folder() / str(name)) if p.exists()), None)
        if found is None:
            said = f"extends {name}: there is no such file beside {shown} or among the shipped recipes"
            problems.append(Problem(said, "extends", "check the name", place))
        else:
            yield found


def _merge(merged: DictConfig, data: Mapping[str, Any]) -> DictConfig:
    """OmegaConf's merge, but a null plugin is kept as null, and one named again after null starts empty."""
    return OmegaConf.merge(merged, OmegaConf.create(dict(data)))  # type: ignore[return-value]


def _shown(path: Path) -> str:
    relative = os.path.relpath(path)
    return relative if len(relative) < len(str(path)) else str(path)


def recipe_folder() -> Path:
    """Where shipped recipes are: the checkout's `recipes/`, or the wheel's copy."""
    here = Path(__file__).resolve().parent
    checkout = here.parent / "recipes"
    return checkout if (checkout / "base.yaml").exists() else here / "_recipes"


def render(problems: Sequence[Problem]) -> str:
    """Problems as they are shown: place, message, remedy; then how many, and that nothing was started."""
    lines = []
    for problem in problems:
        lines.append(f"{problem.place}: {problem.message}" if problem.place else problem.message)
        if problem.remedy:
            lines.append(f"    {problem.remedy}")
    count = len(problems)
    return "\n".join([*lines, f"{count} problem{'s' if count > 1 else ''}. Nothing was started."])
