"""Recipe files and overrides, merged base first, with the place of every key."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from dsplugins.contracts import Problem
from dsplugins.recipe_scan import (
    COMMAND_LINE,
    DEEPEST,
    MAP,
    SECTIONS,
    STR,
    Layer,
    Loader,
    compose,
    compose_file,
    extended,
    is_null,
    one_line,
    prune,
    scan,
    shown_path,
    top_faults,
)


def recipe_folder() -> Path:
    """Where shipped recipes are: `recipes/` of a checkout, else the folder inside the wheel."""
    package = Path(__file__).resolve().parent
    checkout = package.parent
    in_checkout = (checkout / "pyproject.toml").is_file() and (checkout / "recipes").is_dir()
    return checkout / "recipes" if in_checkout else package / "_recipes"


def nearest_place(places: Mapping[str, str], key: str) -> str:
    while key and key not in places:
        key = key.rpartition(".")[0]
    return places.get(key, "")


def find(path: Path, problems: list[Problem]) -> Path | None:
    shipped = recipe_folder() / path
    if path.exists():
        return path
    if shipped.is_file():
        return shipped
    remedy = f"no such file here, nor among the shipped recipes in {shown_path(recipe_folder())}"
    names = [str(p.relative_to(recipe_folder())) for p in recipe_folder().rglob("*.yaml")]
    near = [name for name in names if path.stem == Path(name).stem]
    near += difflib.get_close_matches(str(path), names, n=1)
    remedy = f"did you mean {near[0]}?" if near else remedy
    problems.append(Problem(f"recipe {path} does not exist", "", remedy, COMMAND_LINE))
    return None


class Reader:
    """Reads layers, base first, and gathers problems and places."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.places: dict[str, str] = {}
        self.sources: list[Path] = []
        self.texts: dict[Path, str] = {}
        self._layers: list[Layer] = []
        self._whole = True

    def read(self, path: Path, chain: tuple[Path, ...] = ()) -> None:
        """A file below which everything that it extends is laid first; a second time is ignored."""
        here = path.resolve()
        if here in self.texts:
            return
        shown = shown_path(path)
        text, root = compose_file(path, shown, self.problems)
        self.texts[here] = text
        if root is None:
            self._layers.append(Layer(None, {}, [], []))
            return
        layer = self._layer(root, lambda node: f"{shown}:{node.start_mark.line + 1}")
        known = len(self.problems)
        bases = list(extended(root, shown, self.problems))
        self._whole &= len(self.problems) == known
        for name, place in bases:
            base = _base(name, path, place, self.problems)
            if base is not None and base.resolve() in (*chain, here):
                way = " -> ".join(p.name for p in (*chain, here, base.resolve()))
                self._whole = False
                said = f"extends goes in a circle: {way}"
                self.problems.append(Problem(said, "extends", "drop one of them", place))
            elif base is not None:
                self.read(base, (*chain, here))
            else:
                self._whole = False
        self.sources.append(path)
        self._add(layer)

    def override(self, text: str) -> None:
        """One `key=value` of the command line; the value is YAML."""
        key, equals, raw = text.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            said = f"{text!r} is not KEY=VALUE"
            self.problems.append(Problem(said, "", "write for example train.steps=10", COMMAND_LINE))
            return
        root = compose(f"value: {raw}", lambda line: COMMAND_LINE, self.problems, f"{key}: ")
        if root is None or len(root.value) != 1:
            if root is not None:
                said = f"{key}: its value has more than one line"
                self.problems.append(
                    Problem(said, key, "write lists and mappings as [a, b] and {a: b}", COMMAND_LINE)
                )
            return
        node = root.value[0][1]
        if len(parts) == 1 and (is_null(node) or parts[0] == "extends"):
            said = f"{parts[0]} can't be set as a whole on the command line"
            self.problems.append(Problem(said, key, "name a key below it, or edit the file", COMMAND_LINE))
            return
        for part in reversed(parts):
            node = yaml.MappingNode(MAP, [(yaml.ScalarNode(STR, part), node)])
        self._add(self._layer(node, lambda node: COMMAND_LINE))

    def _layer(self, root: yaml.MappingNode, label: Callable[[yaml.Node], str]) -> Layer:
        layer = Layer(None, {}, [], [])
        self.problems += top_faults(root, label)
        self.problems += scan(root, "", label, layer)
        prune(root, layer.unfit)
        try:
            values: dict[str, Any] = Loader("").construct_document(root)
        except (yaml.YAMLError, ValueError) as error:
            said = f"a value can't be read: {one_line(error)}"
            self.problems.append(Problem(said, "", "quote it", label(root)))
        else:
            # A heading with nothing below it says nothing; only plugins are removed by null.
            # What should be a mapping and is none has been told above.
            layer.values = {k: v for k, v in values.items() if isinstance(v, dict)}
        return layer

    def _add(self, layer: Layer) -> None:
        for leaf in layer.leaves:
            for key in [k for k in self.places if k.startswith(leaf + ".")]:
                del self.places[key]
        self.places |= layer.places
        self._layers.append(layer)

    def merge(self) -> DictConfig | None:
        """All layers as one; None where one of them can't be read, so that no follow-up faults are told."""
        if not self._whole or any(layer.values is None for layer in self._layers):
            return None
        merged: Any = OmegaConf.create({})
        named: set[str] = set()
        clashed = False
        for layer in self._layers:
            values = layer.values or {}
            self.problems += _pointless_removals(values, layer.places, named)
            plain: Any = OmegaConf.to_container(merged, resolve=False)
            clashes = list(_clashes(plain, values, "", layer.places))
            self.problems += clashes
            clashed |= bool(clashes)
            if not clashes:
                merged = OmegaConf.merge(merged, OmegaConf.create(values))
        return None if clashed else merged


def _base(name: str, path: Path, place: str, problems: list[Problem]) -> Path | None:
    folders = (path.parent, recipe_folder())
    found = next((folder / name for folder in folders if (folder / name).is_file()), None)
    if found is None:
        depths = ("*.yaml", "*/*.yaml")
        names = [
            str(p.relative_to(f)) for f in folders for depth in depths for p in f.glob(depth) if p != path
        ]
        near = difflib.get_close_matches(name, names, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"looked in {' and '.join(map(shown_path, folders))}"
        problems.append(Problem(f"extends: {name}: there is no such file", "extends", remedy, place))
    return found


def _pointless_removals(
    values: Mapping[str, Any], places: Mapping[str, str], named: set[str]
) -> Iterator[Problem]:
    """`name: null` for a plugin that nobody named: a typing error that would leave the real one in."""
    plugins = values.get("plugins")
    for name, options in plugins.items() if isinstance(plugins, dict) else ():
        key = f"plugins.{name}"
        if options is not None:
            named.add(name)
        elif name not in named:
            near = difflib.get_close_matches(name, sorted(named), n=1)
            remedy = f"did you mean {near[0]}?" if near else "drop the line"
            yield Problem(
                f"{key}: null removes a plugin that no file names", key, remedy, nearest_place(places, key)
            )


def _clashes(old: Any, new: Any, key: str, places: Mapping[str, str]) -> Iterator[Problem]:
    """A mapping laid over a list, or the other way: versions of OmegaConf differ in what they make of it."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in new.keys() & old.keys():
            yield from _clashes(old[name], new[name], f"{key}.{name}" if key else name, places)
    elif {type(old), type(new)} == {dict, list}:
        kinds = ("a mapping", "a list") if isinstance(new, dict) else ("a list", "a mapping")
        said = f"{key}: {kinds[0]} can't be laid over {kinds[1]}"
        yield Problem(said, key, "give the whole value anew, of the same kind", nearest_place(places, key))


def settle(
    merged: DictConfig | None, reader: Reader
) -> tuple[dict[str, dict[str, Any]], tuple[str, ...], dict[str, dict[str, Any]]]:
    """(plugins, removed plugins, sections) in plain Python, references resolved."""
    if merged is None:
        return {}, (), {}
    faults: list[Problem] = []
    whole = _plain(merged, "", faults, DEEPEST)
    reader.problems += [replace(p, place=nearest_place(reader.places, p.key)) for p in faults]
    plugins = whole.get("plugins", {})
    removed = tuple(name for name, options in plugins.items() if options is None)
    kept = {k: v if isinstance(v, dict) else {} for k, v in plugins.items() if v is not None}
    return kept, removed, {name: whole.get(name, {}) for name in SECTIONS}


def _plain(node: Any, key: str, faults: list[Problem], deeper: int) -> Any:
    """`node` without OmegaConf; each key that can't be resolved is one fault."""
    if not isinstance(node, DictConfig | ListConfig):
        return node
    if deeper == 0:
        key = ".".join(key.split(".")[:2])
        faults.append(Problem(f"{key} contains itself", key, "break the circle of references"))
        return None
    names: Iterable[Any] = list(node.keys()) if isinstance(node, DictConfig) else range(len(node))
    found = {}
    for name in names:
        below = f"{key}.{name}" if key else str(name)
        try:
            value = node[name]
        except MissingMandatoryValue:
            faults.append(Problem(f"{below} must be given: it is ???", below, f"set it, or {below}=VALUE"))
        except (OmegaConfBaseException, RecursionError) as error:
            said = f"{below}: can't be resolved: {one_line(error)}"
            remedy = "set the variable, or write ${oc.env:NAME,default}"
            remedy = remedy if "nvironment variable" in said else "references look like ${model.hidden_size}"
            faults.append(Problem(said, below, remedy))
        else:
            found[name] = _plain(value, below, faults, deeper - 1)
    return found if isinstance(node, DictConfig) else list(found.values())


def escaped(value: Any) -> Any:
    """Texts that hold `${` as characters, written so that they are read as characters again."""
    if isinstance(value, dict):
        return {name: escaped(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [escaped(inner) for inner in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value
