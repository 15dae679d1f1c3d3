"""Writes docs/reference/ from the code: `python docs/generate.py`. With `--check` it only says what is stale.

Everything comes from where the program itself takes it: hook specifications, contract dataclasses, the
plugins' classes as `dsplugins plugins show` reads them, click's commands, the row of `metrics.jsonl`.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import json
import re
import sys
import tomllib
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "docs" / "reference"
NOTE = "<!-- Written by `python docs/generate.py` from {source}. Edit that, not this page. -->"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table; cells are one line, and a `|` in them is text."""
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows]
    return ["", *("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *cells]), ""]


def text_of(thing: object) -> str:
    """Its docstring as Markdown paragraphs."""
    return inspect.cleandoc(getattr(thing, "__doc__", None) or "")


# -- hooks and contract ---------------------------------------------------------------------------


def hooks() -> Iterator[str]:
    """Every hook in the order of a run, then every type that hooks take and return."""
    from dsplugins import contracts, hookspecs

    sources = {module: inspect.getsource(module) for module in (hookspecs, contracts)}
    yield "# Hooks and contract"
    yield NOTE.format(source="dsplugins/hookspecs.py and dsplugins/contracts.py")
    yield text_of(hookspecs)
    version = ".".join(map(str, contracts.CONTRACT))
    yield f"The contract has version {version}."
    heading = re.compile(r"^# -- (.+?) -+$|^def (ds_\w+)", re.MULTILINE)
    for section, name in heading.findall(sources[hookspecs]):
        yield f"## {section[:1].upper()}{section[1:]}" if section else _hook(name)
    yield "## What hooks take and return"
    yield text_of(contracts).partition("\n\n")[2]
    below = _texts_below(sources[contracts])
    for name in contracts.__all__:
        yield _contract(name, getattr(contracts, name), below)


def _hook(name: str) -> str:
    from dsplugins import contracts, hookspecs

    spec = getattr(hookspecs, name)
    signature = inspect.signature(spec)
    words = re.findall(r"\w+", " ".join(map(str, spec.__annotations__.values())))
    known = [word for word in dict.fromkeys(words) if word in contracts.__all__]
    links = ", ".join(f"[{word}](#{word.lower()})" for word in known)
    kind = "slot, one owner" if spec.dsplugins_spec["firstresult"] else "event, any number of listeners"
    facts = [f"{kind}", f"returns `{signature.return_annotation}`", *([f"see {links}"] if links else [])]
    code = f"```python\n{_def(name, signature)}\n```"
    return f"### {name}\n\n{code}\n\n{text_of(spec)}\n\n*{'; '.join(facts)}*"


def _def(name: str, signature: inspect.Signature) -> str:
    """A signature on one line, or an argument a line where that is too long."""
    plain = f"def {name}{signature}".replace("'", "")
    if len(plain) <= 88:
        return plain
    arguments = "".join(f"    {argument},\n" for argument in signature.parameters.values()).replace("'", "")
    return f"def {name}(\n{arguments}) -> {signature.return_annotation}"


def _texts_below(source: str) -> dict[str, str]:
    """Module-level name -> the string that stands below its assignment."""
    body = ast.parse(source).body
    found = {}
    for this, following in zip(body, body[1:], strict=False):
        if isinstance(this, ast.Assign) and isinstance(this.targets[0], ast.Name):
            value = following.value if isinstance(following, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                found[this.targets[0].id] = inspect.cleandoc(value.value)
    return found


def _contract(name: str, value: Any, below: dict[str, str]) -> str:
    """One name of `contracts`: a constant or alias, a dataclass, a protocol, an exception."""
    parts = [f"### {name}"]
    if not inspect.isclass(value):
        parts += [f"`{value}`"] if isinstance(value, tuple) else []
        return "\n\n".join([*parts, below.get(name, "")])
    parts.append(text_of(value))
    parts += ["\n".join(_attributes(value)).strip()]
    parts += list(_methods(value))
    return "\n\n".join(part for part in parts if part)


def _attributes(cls: type) -> list[str]:
    """A row a field: of a dataclass with its default, of a protocol without."""
    from dsplugins.typed import field_docs

    docs = field_docs(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}
    rows = []
    for name, hint in inspect.get_annotations(cls).items():
        if name.startswith("_"):
            continue
        default = fields[name].default if name in fields else dataclasses.MISSING
        shown = "" if default is dataclasses.MISSING else f"`{default!r}`"
        rows.append([f"`{name}`", f"`{hint}`", shown, docs.get(name, "")])
    return table(["field", "type", "default", "meaning"], rows) if rows else []


def _methods(cls: type) -> Iterator[str]:
    for name, member in vars(cls).items():
        function = member.fget if isinstance(member, property) else member
        if name.startswith("_") or not inspect.isfunction(function):
            continue
        how = "property " if isinstance(member, property) else ""
        signature = (
            str(inspect.signature(function)).replace("'", "").replace("(self, ", "(").replace("(self)", "()")
        )
        yield f"- {how}`{name}{signature}`: {' '.join(text_of(function).split())}"


# -- plugins and recipe sections ------------------------------------------------------------------


def plugins() -> Iterator[str]:
    """Every built-in plugin: what its class says of itself."""
    from dsplugins.cli.plugins import describe
    from dsplugins.contracts import SLOTS
    from dsplugins.offers import offers

    yield "# Built-in plugins"
    yield NOTE.format(source="the plugins' classes, as `dsplugins plugins show NAME` reads them")
    yield "`dsplugins plugins show NAME` prints the same, and does so for anybody's plugin."
    built_in = [offer for offer in offers() if offer.distribution == "dsplugins"]
    for slot in (*SLOTS, "event"):
        yield f"## {slot}"
        for offer in built_in:
            if offer.slot == slot:
                yield _plugin(describe(offer))


def _plugin(facts: dict[str, Any]) -> str:
    hooks_filled = ", ".join(f"[{hook}](hooks.md#{hook})" for hook in facts["hooks"])
    parts = [f"### {facts['name']}", facts["about"], "\n".join(options_table(facts["options"])).strip()]
    parts.append(f"Hooks: {hooks_filled}.")
    parts += [
        f"{key.capitalize()}: {', '.join(facts[key])}." for key in ("requires", "conflicts") if facts[key]
    ]
    parts += [f"Environment: `{name}={value}`." for name, value in facts["env"].items()]
    return "\n\n".join(part for part in parts if part)


def options_table(options: list[dict[str, Any]]) -> list[str]:
    """Options as `dsplugins.cli.options` gives them."""
    rows = []
    for option in options:
        default = "needed" if option["needed"] else f"`{json.dumps(option['default'])}`"
        rows.append([f"`{option['name']}`", option["type"], default, option["about"]])
    return table(["option", "type", "default", "meaning"], rows) if rows else ["No options."]


def sections() -> Iterator[str]:
    """The sections of a recipe that are dsplugins' own; the others hold Megatron's fields."""
    from dsplugins.cli.options import options
    from dsplugins.contracts import Layout, Plan
    from dsplugins.plan import Parallel

    yield "# Sections of a recipe"
    yield NOTE.format(source="dsplugins/plan.py and dsplugins/contracts.py")
    yield (
        "`model`, `optimizer` and `ddp` hold megatron-core's own fields (of `TransformerConfig`, "
        "`OptimizerConfig` and `DistributedDataParallelConfig`) and `model.vocab_size`. `plugins` holds the "
        "[plugins](plugins.md). The others are below; [Recipes](../recipes.md) says how they work together."
    )
    for name, cls in typing.get_type_hints(Plan).items():
        if cls is Layout:  # what a Plan holds of `parallel:`, with the world size beside it
            name, cls = "parallel", Parallel
        if dataclasses.is_dataclass(cls):
            yield f"## {name}\n" + "\n".join(options_table(options(cls)))


# -- commands and metrics -------------------------------------------------------------------------


def cli() -> Iterator[str]:
    """Every command as its `--help` has it, and the exit codes."""
    from dsplugins.cli import group
    from dsplugins.cli.exits import CODES

    yield "# Commands"
    yield NOTE.format(source="dsplugins/cli/")
    # As `main` makes it: a bare Context would lack the group's settings, such as `-h`.
    context = group.make_context("dsplugins", [], resilient_parsing=True, terminal_width=80)
    yield from _command(group, context, 1)
    yield "## Exit codes\n" + "\n".join(table(["code", "meaning"], [[str(k), v] for k, v in CODES.items()]))
    yield "`torchrun` turns every worker's code into 1; a run's `status.json` keeps code and reason."


def _command(command: Any, context: Any, depth: int) -> Iterator[str]:
    import click

    usage = command.get_usage(context).removeprefix("Usage: ")
    heading = [f"{'#' * depth} {context.command_path}"] if depth > 1 else []
    yield "\n\n".join([*heading, f"```text\n{usage}\n```", inspect.cleandoc(command.help or "")])
    rows = [list(record) for p in command.get_params(context) if (record := p.get_help_record(context))]
    if rows:
        yield "\n".join(table(["option", "meaning"], [[f"`{flag}`", text] for flag, text in rows]))
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            yield from _command(inner, click.Context(inner, info_name=name, parent=context), depth + 1)


def metrics() -> Iterator[str]:
    """What a line of `metrics.jsonl` holds, from the function that makes it."""
    from dsplugins.contracts import Step
    from dsplugins.train import as_row
    from dsplugins.typed import field_docs

    yield "# metrics.jsonl"
    yield NOTE.format(source="dsplugins/train.py (as_row) and contracts.Step")
    yield (
        "One JSON object a step. Keys are always there; a value is null where the model has no such thing. "
        "`step` in the second column is the [Step](hooks.md#step) that plugins get."
    )
    docs = field_docs(Step)
    (row,) = [node for node in ast.walk(ast.parse(inspect.getsource(as_row))) if isinstance(node, ast.Dict)]
    rows = []
    for key, value in zip(row.keys, row.values, strict=True):
        code = ast.unparse(value)
        field = code.removeprefix("step.")
        rows.append([f"`{ast.literal_eval(key)}`", f"`{code}`", docs.get(field, "")])
    yield "\n".join(table(["key", "value", "meaning"], rows))
    yield (
        "Event plugins add keys of their own: what their [ds_step_end](hooks.md#ds_step_end) returns. "
        "[expert_load](plugins.md#expert_load) is one."
    )


# -- the package ----------------------------------------------------------------------------------


def house() -> Iterator[str]:
    """Every module of the package, from the top of import-linter's layers down, in its own words."""
    linter = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (layers,) = [contract["layers"] for contract in linter["contracts"] if contract["type"] == "layers"]
    package = ROOT / "dsplugins"
    yield "# What stands where"
    yield NOTE.format(source="the modules of dsplugins/ and the layers in pyproject.toml")
    yield "A module imports only from lines below its own; import-linter holds that."
    rows = [row for layer in layers for name in layer.split(" : ") if (row := _module(package / name))]
    yield "\n".join(table(["module", "one idea"], rows))
    standing = {row[0] for row in rows}
    names = sorted({path.stem for path in package.iterdir() if not path.stem.startswith(("_", "."))})
    beside = [row for name in names if (row := _module(package / name)) and row[0] not in standing]
    yield "Beside the layers:"
    yield "\n".join(table(["module", "one idea"], beside))


def _module(path: Path) -> list[str]:
    """[name, first paragraph] of a module or package; [] where there is none, or it says nothing."""
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not file.exists():
        return []
    said = ast.get_docstring(ast.parse(file.read_text())) or ""
    name = f"`{path.name}{'/' if path.is_dir() else '.py'}`"
    return [name, said.partition("\n\n")[0]] if said else []


PAGES: dict[str, Callable[[], Iterator[str]]] = {
    "hooks.md": hooks,
    "plugins.md": plugins,
    "sections.md": sections,
    "cli.md": cli,
    "metrics.md": metrics,
    "house.md": house,
}


def page(name: str) -> str:
    """The text that `reference/NAME` should have."""
    return re.sub(r"\n{3,}", "\n\n", "\n\n".join(part.strip("\n") for part in PAGES[name]())) + "\n"


def stale() -> list[str]:
    """Names of the pages that are not what the code says."""
    there = {name: REFERENCE / name for name in PAGES}
    return [name for name, file in there.items() if not file.exists() or file.read_text() != page(name)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write docs/reference/ from the code.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a page is stale")
    old = stale()
    if parser.parse_args().check:
        sys.exit(f"stale: {', '.join(old)}; run `python docs/generate.py`" if old else 0)
    REFERENCE.mkdir(exist_ok=True)
    for name in old:
        (REFERENCE / name).write_text(page(name))
        print(f"wrote {REFERENCE / name}")


if __name__ == "__main__":
    main()
