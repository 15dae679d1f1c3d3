"""What core's all-to-all dispatcher can't do here, whoever carries its tokens."""

from __future__ import annotations

from collections.abc import Iterable

from dsplugins.contracts import Plan, Problem, Settings


def refused(name: str, plan: Plan, settings: Settings) -> Iterable[Problem]:
    """Problems of the dispatcher that is called `name` in recipes.

    Overlapped shared experts run inside the dispatcher, which has to be handed them: it isn't. Experts that
    several ranks share get each other's tokens by an all-gather of parts that differ in size where the
    experts are spread, too: gloo gathers equal parts only.
    """
    if settings.model.moe_shared_expert_overlap:
        key = "model.moe_shared_expert_overlap"
        said = f"{key}=True: the shared experts would be left out, {name} isn't given them"
        yield Problem(said, key, "leave it out: the shared experts then run on their own")
    layout = plan.layout
    if plan.slots.get("platform") == "cpu" and layout.expert > 1 and layout.expert_tensor > 1:
        said = (
            f"{name} with parallel.expert={layout.expert} and parallel.expert_tensor={layout.expert_tensor}"
        )
        said += " gathers parts of different sizes, which the CPU's gloo can't"
        yield Problem(said, "parallel.expert_tensor", "parallel.expert_tensor: 1, or the platform cuda")
