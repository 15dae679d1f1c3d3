"""What `dsplugins check` found, as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dsplugins.cli.columns import columns
from dsplugins.settings import spans
from dsplugins.words import duration, operations, size


def text(findings: Mapping[str, Any], here: bool) -> str:
    """Layout, stages, counts and, with `here`, the machine; blocks between empty lines."""
    blocks = ["\n".join(_head(findings))]
    if "stages" in findings:
        blocks += [
            _stages(findings["stages"]),
            _counts(findings["counts"]) + _cache(findings) + _training(findings),
        ]
    if "machine" in findings:
        blocks.append(_machine(findings["machine"]))
    blocks.append("\n".join(_end(findings, here)))
    return "\n\n".join(blocks)


def _head(findings: Mapping[str, Any]) -> Iterator[str]:
    layout = findings["layout"]
    sizes = ", ".join(
        f"{name.replace('_', ' ')} {size}"
        for name, size in layout.items()
        if size > 1 and name not in ("world_size", "data", "expert_data")
    )
    yield (
        f"layout: {layout['world_size']} processes, data parallel {layout['data']}"
        f"{', ' if sizes else ''}{sizes}"
    )
    yield f"micro-batches a step: {spans(findings['micro_batches'])}"
    for plugin, name in findings.get("stand_ins", {}).items():
        yield f"stand-in: built with {name} in the place of {plugin}, which a run uses"


def _stages(rows: list[dict[str, Any]]) -> str:
    several = any(row["chunk"] for row in rows)
    copies = any(row["embedding_copy"] for row in rows)
    table = [["stage", *(["chunk"] if several else []), "parameters of a rank", "state", "layers"]]
    for row in rows:
        layers = row["layers"]
        if row["embedding_copy"]:
            layers += f", a copy of the embedding ({row['embedding_copy']:,})"
        chunk = [str(row["chunk"])] if several else []
        state = size(sum(row["state"].values()))
        table.append([str(row["stage"]), *chunk, f"{row['parameters']:,}", state, layers])
    note = "\nThe copy is MTP's own of the first stage's embedding, kept equal to it; counted once below."
    for title in ("parameters of a rank", "state"):
        table = _right(table, title)
    return columns(table) + (note if copies else "") + f"\n{_state(rows)}"


def _state(rows: list[dict[str, Any]]) -> str:
    """What the state of the fullest stage is made of; its chunks together."""
    stages: dict[int, dict[str, int]] = {}
    for row in rows:
        sums = stages.setdefault(row["stage"], dict.fromkeys(row["state"], 0))
        for name, count in row["state"].items():
            sums[name] += count
    fullest = max(stages, key=lambda stage: sum(stages[stage].values()))
    parts = ", ".join(f"{name.replace('_', ' ')} {size(count)}" for name, count in stages[fullest].items())
    return f"State of a rank of stage {fullest}, without activations: {parts}."


def _counts(counts: Mapping[str, Mapping[str, int]]) -> str:
    titles = list(next(iter(counts.values())))
    table = [["parameters", *(title.replace("_", " ") for title in titles)]]
    for name, row in counts.items():
        shown = name.replace("_", " ").replace("mtp", "MTP")
        table.append([shown, *(f"{row[title]:,}" for title in titles)])
    for title in table[0][1:]:
        table = _right(table, title)
    return columns(table)


def _cache(findings: Mapping[str, Any]) -> str:
    kept = findings["kv_cache_bytes"]
    return "" if kept is None else f"\nKV cache of a token in BF16: {kept:,} bytes."


def _training(findings: Mapping[str, Any]) -> str:
    """Tokens of the run, operations of one, and what they come to at the speed that was asked for."""
    training = findings["training"]
    said = f"\nTraining: {training['tokens']:,} tokens in sequences of {training['sequence']:,}"
    if training["flops_a_token"] is None:
        said += "; the operations of its attention are not known."
    else:
        masked, unmasked = (operations(training[f"flops_a_token{all_}"]) for all_ in ("", "_unmasked"))
        said += f", {masked} a token, MTP apart ({unmasked} with attention counted without its mask)."
    return said + (f"\n{_bill(training, findings['bill'])}" if "bill" in findings else "")


def _bill(training: Mapping[str, Any], bill: Mapping[str, Any]) -> str:
    process = "GPU" if training["platform"] == "cuda" else "process"
    speed = "" if bill["tflops"] is None else f" ({bill['tflops']:.4g} TFLOP/s)"
    price = "" if bill["dollars"] is None else f", {_count(bill['dollars'])} dollars"
    return (
        f"At {bill['tokens_per_second']:,.10g} tokens a second on each {process}{speed}: "
        f"{duration(bill['seconds'])}, {_count(bill['hours'])} {process}-hours{price}."
    )


def _count(number: float) -> str:
    """Whole from a thousand on, three digits below."""
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"


def _machine(machine: Mapping[str, Any]) -> str:
    rows = [[row["state"], row["what"], row["found"]] for row in machine["found"]]
    return f"this machine, for {machine['processes']} processes of the run:\n{columns(rows)}"


def _end(findings: Mapping[str, Any], here: bool) -> Iterator[str]:
    lacking = [problem for problem in findings["problems"] if problem["kind"] == "environment"]
    if lacking and not here and "stages" in findings:
        yield "a run needs what this machine lacks (--here looks at its devices, too):"
        yield from (f"  {problem['message']}" for problem in lacking)
    if "stages" in findings:
        took = f"{findings['build_seconds']:.1f} s to build, {findings['seconds']:.1f} s in all"
        yield f"{findings['recipe']}: nothing wrong with the recipe ({took})"


def _right(table: list[list[str]], title: str) -> list[list[str]]:
    """The table with the column of that title, if there is one, set to the right."""
    if title not in table[0]:
        return table
    at = table[0].index(title)
    width = max(len(row[at]) for row in table)
    return [[*row[:at], row[at].rjust(width), *row[at + 1 :]] for row in table]


__all__ = ["text"]
