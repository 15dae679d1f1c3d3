"""`dsplugins check RECIPE [KEY=VALUE ...]`: whether a recipe fits together, and what it comes to."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import click

POSITIVE = click.FloatRange(min=0.0, min_open=True)


@click.command("check")
@click.argument("recipe")
@click.argument("overrides", nargs=-1)
@click.option("--here", is_flag=True, help="Also whether this machine can run it.")
@click.option("--tflops", type=POSITIVE, help="Days and GPU-hours at so many TFLOP/s on each GPU.")
@click.option("--dollars", type=POSITIVE, help="What a GPU-hour costs; with --tflops.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def command(
    recipe: str,
    overrides: tuple[str, ...],
    here: bool,
    tflops: float | None,
    dollars: float | None,
    as_json: bool,
) -> None:
    """Check RECIPE without running it: no GPU, no TransformerEngine, no data needed.

    Builds every pipeline stage on the meta device, as ranks of the recipe's own number, and counts
    parameters. Exit code 3 if the recipe is wrong. With --here, exit code 4 if this machine lacks what it
    needs: libraries, devices, data; set LOCAL_WORLD_SIZE for a machine that runs a part of the ranks.

    --tflops takes what a GPU of this layout was measured at, operations counted with the causal mask.
    """
    from dsplugins.cli import check_report
    from dsplugins.cli.child import ChildFailed
    from dsplugins.contracts import RecipeError

    if dollars is not None and tflops is None:
        raise click.UsageError("--dollars needs --tflops: without a speed there are no hours")
    began = time.perf_counter()
    try:
        findings = _findings(recipe, overrides, here)
    except ChildFailed as failure:
        click.echo(f"{recipe}: {failure}", err=True)
        raise SystemExit(1) from None
    work, plan = findings.get("work"), findings.pop("_plan", None)
    if tflops is not None and "work" in findings:
        findings["bill"] = _bill(plan, work, tflops, dollars) if work else None
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
    if found.get("work"):
        found["work"] = _work(found["work"], plan.data.seq_length)
    if machine:
        with waiting("looking at this machine"):
            answer = machine.answer()
        problems += [Problem(**fields) for fields in answer.pop("problems")]
        found |= answer
    return found | _with(problems) | {"_plan": plan}


def _bill(plan: Any, work: Mapping[str, Any], tflops: float, dollars: float | None) -> dict[str, Any]:
    """The recipe's training at this speed."""
    from dsplugins.cost import Bill, TokenWork, tokens_of

    of_token = TokenWork(work["weights"], work["pairs"], work["sequence"])
    bill = Bill.at(tflops * 1e12, tokens_of(plan), of_token, plan.layout.world_size)
    return {
        "tflops": tflops,
        "tokens": bill.tokens,
        "tokens_per_second": bill.tokens_per_second,
        "days": bill.seconds / 86400,
        "gpus": bill.gpus,
        "gpu_hours": bill.gpu_hours,
        "dollars": None if dollars is None else bill.price(dollars),
    }


def _with(problems: Sequence[Any]) -> dict[str, Any]:
    unique = list(dict.fromkeys(problems))
    return {"problems": [vars(problem) for problem in unique], "_problems": unique}


def _work(counted: Mapping[str, int], sequence: int) -> dict[str, Any]:
    """With the operations of a token, counted in both ways."""
    from dsplugins.cost import TokenWork

    work = TokenWork(**counted, sequence=sequence)
    return vars(work) | {"flops": work.causal, "flops_unmasked": work.unmasked}


def _plan(plan: Any) -> dict[str, Any]:
    """Layout and batches, from the plan."""
    unit = plan.train.micro_batch * plan.layout.data
    counts = [batch // unit for batch in plan.train.global_batch.distinct(plan.train.multiple(unit))]
    return {
        "layout": vars(plan.layout) | {"data": plan.layout.data, "expert_data": plan.layout.expert_data},
        "micro_batches": counts,
    }
