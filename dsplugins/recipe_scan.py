"""Recipe text -> YAML nodes with their lines, and what is wrong with them before any value is read."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dsplugins.contracts import Problem

SECTIONS = ("model", "parallel", "optimizer", "ddp", "data", "train", "evaluate", "save", "run")
TOP = ("extends", "plugins", *SECTIONS)
COMMAND_LINE = "command line"

STR, MAP, _NULL = (f"tag:yaml.org,2002:{name}" for name in ("str", "map", "null"))
DEEPEST = 50
"""Nested mappings; more is a reference that contains itself."""


def shown_path(path: Path) -> str:
    relative = os.path.relpath(path)
    return relative if len(relative) < len(str(path)) else str(path)


class Loader(yaml.SafeLoader):
    """Plain YAML in which `1e-4` is a number, as in YAML 1.2 and OmegaConf, and a date is text."""


Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if not pair[0].endswith((":float", ":timestamp"))]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?$"
        r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


@dataclass
class Layer:
    """One file or one override, before the merge."""

    values: dict[str, Any] | None
    """What fits, for the merge; None where the text can't be read at all."""
    places: dict[str, str]
    leaves: list[str]
    """Keys that hold no mapping: what stood below them in earlier layers is gone."""
    unfit: list[yaml.Node]
    """Keys and values at fault, which are left out of the merge."""


def compose_file(path: Path, shown: str, problems: list[Problem]) -> tuple[str, yaml.MappingNode | None]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        said = f"can't be read: {error.strerror or error}"
        problems.append(Problem(said, "", "give a YAML file", shown))
        return "", None
    except UnicodeDecodeError:
        problems.append(Problem("is not a text file", "", "give a YAML file in UTF-8", f"{shown}:1"))
        return "", None
    return text, compose(text, lambda line: f"{shown}:{line}", problems)


def compose(
    text: str, label: Callable[[int], str], problems: list[Problem], who: str = ""
) -> yaml.MappingNode | None:
    """The node tree of a YAML text that is one mapping; None, and a problem, if it is not."""
    try:
        faults = list(_event_faults(text, label, who))
        root = yaml.compose(text, Loader=Loader) if not faults else None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        # A control character is found before there are lines: the file is not text.
        said = "is not a text file" if isinstance(error, yaml.reader.ReaderError) else "is not YAML"
        said += f": {one_line(getattr(error, 'problem', None) or error)}"
        faults = [Problem(who + said, "", "mend it, or quote the value", label(mark.line + 1 if mark else 1))]
        root = None
    except RecursionError:
        faults, root = [Problem(f"{who}is nested too deeply", "", "flatten it", label(1))], None
    problems += faults
    if faults or isinstance(root, yaml.MappingNode):
        return root
    said = "is empty" if root is None else "is not a mapping"
    problems.append(
        Problem(who + said, "", "a recipe is made of sections: `train:` and keys below", label(1))
    )
    return None


def _event_faults(text: str, label: Callable[[int], str], who: str) -> Iterator[Problem]:
    """Aliases and tags: values written elsewhere, and values that are more than data."""
    for event in yaml.parse(text, Loader=Loader):
        place = label(event.start_mark.line + 1)
        if isinstance(event, yaml.AliasEvent):
            said = f"{who}*{event.anchor}: recipes have no YAML aliases"
            yield Problem(said, "", "refer to another key with ${section.key}, or write it out", place)
        elif getattr(event, "tag", None) is not None:
            said = f"{who}{event.tag}: recipes have no YAML tags"
            yield Problem(said, "", "drop it; quotes make text of anything", place)


def scan(node: yaml.Node, key: str, label: Callable[[yaml.Node], str], layer: Layer) -> Iterator[Problem]:
    """Notes the places of all keys below `node`; yields what makes some of its values unfit to merge."""
    prefix = f"{key}." if key else ""
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, str] = {}
        for key_node, value in node.value:
            place = label(key_node)
            faults = list(_key_faults(key_node, prefix, place, seen))
            yield from faults
            layer.unfit += [key_node] if faults else []
            if faults and not isinstance(key_node, yaml.ScalarNode):
                continue
            child = prefix + key_node.value
            seen.setdefault(key_node.value, place)
            layer.places[child] = place
            yield from scan(value, child, label, layer)
        return
    layer.leaves.append(key)
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            layer.places[f"{prefix}{index}"] = label(item)
            yield from scan(item, f"{prefix}{index}", label, layer)
    else:
        faults = list(_text_faults(node.value, key, label(node)))
        yield from faults
        layer.unfit += [node] if faults else []


def prune(node: yaml.MappingNode, unfit: Collection[yaml.Node]) -> None:
    """Take out what is unfit: a key with its value, a value with its key, a list with its item."""
    node.value = [
        (key, value)
        for key, value in node.value
        if key not in unfit and (isinstance(value, yaml.MappingNode) or _sound(value, unfit))
    ]
    for _, value in node.value:
        if isinstance(value, yaml.MappingNode):
            prune(value, unfit)


def _sound(node: yaml.Node, unfit: Collection[yaml.Node]) -> bool:
    """Whether nothing in `node` is unfit."""
    if isinstance(node, yaml.MappingNode):
        return all(key not in unfit and _sound(value, unfit) for key, value in node.value)
    inner = node.value if isinstance(node, yaml.SequenceNode) else ()
    return node not in unfit and all(_sound(item, unfit) for item in inner)


def _key_faults(node: yaml.Node, prefix: str, place: str, seen: Mapping[str, str]) -> Iterator[Problem]:
    if not isinstance(node, yaml.ScalarNode) or node.tag != STR:
        name = node.value if isinstance(node, yaml.ScalarNode) else "?"
        yield Problem(f"{prefix}{name} is not text, as a key must be", prefix.rstrip("."), "quote it", place)
        return
    name, key = node.value, prefix + node.value
    if name in seen:
        yield Problem(f"{key} is given twice, first at {seen[name]}", key, "drop one of them", place)
    if name == "_target_":
        yield Problem(
            f"{key}: a recipe is data and can't name code", key, "name a plugin under plugins", place
        )
    if "." in name:
        inner = name.partition(".")
        remedy = f"nest it: `{inner[0]}: {{{inner[2]}: ...}}`; dots are for the command line"
        yield Problem(f"{key}: a key can't hold a dot", key, remedy, place)


def _text_faults(text: str, key: str, place: str) -> Iterator[Problem]:
    """Resolver calls, and references that are not well formed."""
    for call in _resolver_calls(text):
        if call != "oc.env" or key.split(".")[0] not in ("data", "run"):
            said = f"{key}: the resolver {call or '${...}'} is not allowed here"
            remedy = "references like ${train.seed} are fine; ${oc.env:NAME} under data and run only"
            yield Problem(said, key, remedy, place)
    if "${" in text:
        try:
            OmegaConf.create({"value": text})
        except OmegaConfBaseException as error:
            said = f"{key}: {text!r} is not a reference: {one_line(error)}"
            yield Problem(said, key, "write ${section.key}, or \\${ for the characters themselves", place)


def _resolver_calls(text: str) -> Iterator[str]:
    """Names of the resolvers called in `text`: whatever stands before a colon inside `${...}`.

    A reference holds no colon, so that nothing that OmegaConf would call goes unseen.
    """
    opened: list[tuple[int, bool]] = []
    at = 0
    while at < len(text):
        escaped = (at - len(text[:at].rstrip("\\"))) % 2 == 1
        if text.startswith("${", at) and not escaped:
            opened.append((at + 2, False))
            at += 1
        elif text[at] == "}" and opened:
            opened.pop()
        elif text[at] == ":" and opened and not opened[-1][1]:
            start = opened[-1][0]
            yield text[start:at].strip()
            opened[-1] = (start, True)
        at += 1


def is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == _NULL


def top_faults(root: yaml.MappingNode, label: Callable[[yaml.Node], str]) -> Iterator[Problem]:
    """Unknown sections, and sections and plugins that are not mappings."""
    for key_node, value in root.value:
        name, place = str(key_node.value), label(key_node)
        if name not in TOP:
            if "." in name:
                continue
            near = difflib.get_close_matches(name, TOP, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"sections are {', '.join(TOP)}"
            yield Problem(f"{name} is not a section of a recipe", name, remedy, place)
        elif name == "plugins" and isinstance(value, yaml.MappingNode):
            yield from _plugin_faults(value, label)
        elif name != "extends" and not isinstance(value, yaml.MappingNode) and not is_null(value):
            example = "aux_free: {}" if name == "plugins" else "KEY: VALUE"
            yield Problem(f"{name} is not a mapping", name, f"write `{example}` below `{name}:`", place)


def _plugin_faults(node: yaml.MappingNode, label: Callable[[yaml.Node], str]) -> Iterator[Problem]:
    for key_node, value in node.value:
        name, place = str(key_node.value), label(key_node)
        key = f"plugins.{name}"
        if not re.fullmatch(r"([a-z0-9-]+/)?[a-z][a-z0-9_]*", name):
            remedy = (
                "NAME or DISTRIBUTION/NAME, in small letters, digits and _; "
                "a plugin must be installed, a recipe can't name code"
            )
            yield Problem(f"{key} is not a plugin's name", key, remedy, place)
        if not isinstance(value, yaml.MappingNode) and not is_null(value):
            remedy = f"write `{name}: {{}}` to name it without options, `{name}: null` to remove it"
            yield Problem(f"{key} is neither a mapping of options nor null", key, remedy, place)


def extended(root: yaml.MappingNode, shown: str, problems: list[Problem]) -> Iterator[tuple[str, str]]:
    """(name, place) of each file that `extends:` lists."""
    for key_node, value in root.value:
        if key_node.value != "extends" or is_null(value):
            continue
        place = f"{shown}:{key_node.start_mark.line + 1}"
        if not isinstance(value, yaml.SequenceNode):
            problems.append(Problem("extends is not a list", "extends", "write [base.yaml]", place))
            continue
        for item in value.value:
            place = f"{shown}:{item.start_mark.line + 1}"
            if isinstance(item, yaml.ScalarNode) and item.tag == STR and item.value:
                yield item.value, place
            else:
                problems.append(Problem("extends: not a file name", "extends", "write [base.yaml]", place))


def one_line(error: object) -> str:
    """The first line of what an exception says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
