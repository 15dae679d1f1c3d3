"""`dsplugins check RECIPE [KEY=VALUE ...]`: whether a recipe fits together, and what it comes to."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import click


def _positive(context: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    if value is not None and not 0.0 < value < math.inf:
        raise click.BadParameter(f"{value} is not a number above 0")
    return value


@click.command("check")
@click.argument("recipe")
@click.argument("overrides", nargs=-1)
@click.option("--here", is_flag=True, help="Also whether this machine can run it.")
@click.option(
    "--tokens-per-second",
    "rate",
    type=float,
    callback=_positive,
    help="Days and GPU-hours at so many tokens a second on each process.",
)
@click.option(
    "--dollars",
    type=float,
    callback=_positive,
    help="What a process costs an hour; with --tokens-per-second.",
)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def command(
    recipe: str,
    overrides: tuple[str, ...],
    here: bool,
    rate: float | None,
    dollars: float | None,
    as_json: bool,
) -> None:
    """Check RECIPE without running it: no GPU, no TransformerEngine, no data needed.

    Builds every pipeline stage on the meta device, as ranks of the recipe's own number, and counts
    parameters. Exit code 3 if the recipe is wrong. With --here, exit code 4 if this machine lacks what it
    needs: libraries, devices, data; set LOCAL_WORLD_SIZE for a machine that runs a part of the ranks.
    """
    from dsplugins.cli import check_report
    from dsplugins.cli.child import ChildFailed
    from dsplugins.contracts import RecipeError

    if dollars is not None and rate is None:
        raise click.UsageError("--dollars needs --tokens-per-second: without a speed there are no hours")
    began = time.perf_counter()
    try:
        findings = _findings(recipe, overrides, here)
    except ChildFailed as failure:
        click.echo(f"{recipe}: {failure}", err=True)
        raise SystemExit(1) from None
    if rate is not None and "stages" in findings:
        findings["bill"] = bill(findings["training"], rate, dollars)
    findings["seconds"] = time.perf_counter() - began
    problems = findings.pop("_problems")
    must_fit = here or "stages" not in findings
    wrong = [problem for problem in problems if must_fit or problem.kind == "recipe"]
    if as_json:
        click.echo(json.dumps(findings, indent=1))
    elif not any(problem.kind == "recipe" for problem in problems):
        click.echo(check_report.text(findings, here))
    if not wrong:
        return
    if as_json:
        raise SystemExit(3 if any(problem.kind == "recipe" for problem in wrong) else 4)
    raise RecipeError(wrong)


def _findings(recipe: str, overrides: Sequence[str], here: bool) -> dict[str, Any]:
    """What this process finds, and its children: problems, plan, stages, counts, machine.

    Raises ChildFailed where one of them crashed, or a plugin in it.
    """
    from dsplugins import process_group
    from dsplugins.cli import child, exits
    from dsplugins.cli.waiting import waiting
    from dsplugins.contracts import Problem, RecipeError
    from dsplugins.plan import prepare
    from dsplugins.recipe import Recipe

    request = {"recipe": recipe, "overrides": list(overrides)}
    found: dict[str, Any] = {"recipe": recipe}
    try:
        loaded = Recipe.load(recipe, overrides)
        plugins, plan = prepare(loaded)
    except RecipeError as error:
        return found | _with(error.problems)
    machine = child.start("dsplugins.cli.here", request) if here else None
    stages = plan.layout.pipeline
    with waiting(f"building {stages} pipeline stage{'s' if stages > 1 else ''} on the meta device"):
        meta = child.start("dsplugins.meta", request, without_gpu=True).answer()
    if "failed" in meta:
        calls = f"\n{meta['calls']}" if exits.DEBUG in os.environ else " (dsplugins --debug shows the calls)"
        raise child.ChildFailed(f"{meta['failed']}{calls}")
    problems = loaded.located(process_group.missing(plan, plugins))
    problems += [Problem(**fields) for fields in meta.pop("problems")]
    found |= _plan(plan) | (meta.pop("built") or {})
    if "stages" in found:
        found["training"] = _training(plan, found.pop("work"))
    if machine:
        with waiting("looking at this machine"):
            answer = machine.answer()
        problems += [Problem(**fields) for fields in answer.pop("problems")]
        found |= answer
    return found | _with(problems)


def bill(training: Mapping[str, Any], rate: float, dollars: float | None) -> dict[str, Any]:
    """The whole training at `rate` tokens a second on each process."""
    from dsplugins.cost import Bill

    made = Bill(training["tokens"], rate, training["processes"])
    flops = [training[name] for name in ("flops_a_token", "flops_a_token_unmasked")]
    tflops, unmasked = (None if each is None else each * rate / 1e12 for each in flops)
    return {
        "tokens_per_second": rate,
        "tflops": tflops,
        "tflops_unmasked": unmasked,
        "seconds": made.seconds,
        "hours": made.hours,
        "dollars": None if dollars is None else made.price(dollars),
    }


def _with(problems: Sequence[Any]) -> dict[str, Any]:
    unique = list(dict.fromkeys(problems))
    return {"problems": [vars(problem) for problem in unique], "_problems": unique}


def _training(plan: Any, work: Mapping[str, int] | None) -> dict[str, Any]:
    """Tokens of the whole run, and operations of one; null where the attention's are not known."""
    from dsplugins.cost import TokenWork, tokens_of

    of_token = None if work is None else TokenWork(**work, sequence=plan.data.seq_length)
    return {
        "sequence": plan.data.seq_length,
        "tokens": tokens_of(plan),
        "processes": plan.layout.world_size,
        "platform": plan.slots["platform"],
        "flops_a_token": of_token and of_token.causal,
        "flops_a_token_unmasked": of_token and of_token.unmasked,
    }


def _plan(plan: Any) -> dict[str, Any]:
    """Layout and batches, from the plan."""
    unit = plan.train.micro_batch * plan.layout.data
    counts = [batch // unit for batch in plan.train.global_batch.distinct(plan.train.multiple(unit))]
    return {
        "layout": vars(plan.layout) | {"data": plan.layout.data, "expert_data": plan.layout.expert_data},
        "micro_batches": counts,
    }
