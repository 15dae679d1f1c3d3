"""Runs that are not what was chosen, assembled in a resident worker, and what the audit says of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

DENSE = [
    *(
        "plugins.aux_free=null",
        "plugins.grouped=null",
        "plugins.alltoall=null",
        "plugins.gpt.dense_layers=0",
    ),
    *(f"model.{name}=null" for name in ("num_moe_experts", "moe_router_num_groups", "moe_router_group_topk")),
    *("model.moe_ffn_hidden_size=null", "model.moe_shared_expert_intermediate_size=null"),
]
"""The tiny model without experts."""
BF16 = ["plugins.bf16={}", "plugins.fp32=null"]
INTERLEAVED = [
    *("parallel.pipeline=2", "parallel.virtual_pipeline=2"),
    *("plugins.one_f_one_b=null", "plugins.interleaved={}"),
]


@contextlib.contextmanager
def unaudited(*overrides: str) -> Iterator[Any]:
    """An assembly that nobody has looked at yet."""
    from runs import assembled

    from dsplugins import audit

    with mock.patch.object(audit, "audit", lambda run: None):
        context = assembled(list(overrides))
        run = context.__enter__()
    try:
        yield run
    finally:
        context.__exit__(None, None, None)


def verdict(run: Any) -> list[str]:
    """What the audit finds."""
    from dsplugins import audit

    try:
        audit.audit(run)
    except audit.AuditFailure as failure:
        return list(failure.differences)
    return []


def hook(function: Any) -> Any:
    """`function` as a plugin's hook, to stand in its class."""
    from dsplugins.hookspecs import hookimpl

    return hookimpl(function)
