"""Every field of core's configuration that nothing in a run reads is refused: found in the sources."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from dsplugins.testing.pool import Workers

CONFIGURATIONS = ("transformer_config.py", "model_parallel_config.py")
NEVER_BUILT = ("experimental_attention_variant", "ssm")
"""Folders of core's attentions that come along with others and that no plugin here builds."""
RUNS = (
    [],
    ["plugins.fp32=null", "plugins.bf16={}", "plugins.v3_recompute={}", "plugins.grouped=null",
     "plugins.sequential={}", "plugins.alltoall=null", "plugins.allgather={}"],
)  # fmt: skip
ONE_STEP = ["train.steps=1", "evaluate.sequences=4"]
TURNED_INTO_OTHERS = {
    "disable_bf16_reduced_precision_matmul": "a switch of torch's",
    "embedding_init_method_std": "refused by its value",
    "moe_enable_deepep": "the flex dispatcher",
    "moe_router_padding_for_fp8": "moe_router_padding_for_quantization",
    "moe_router_topk_limited_devices": "moe_router_num_groups and moe_router_group_topk",
}
"""Fields that the configuration acts on itself, when it is made -> what becomes of them."""
OF_A_SCHEDULE = {"ep_overlap_early_attn_memory_release": "ep_overlap"}


def sources_of_runs():
    """Files of core and of dsplugins that training imports."""
    import sys

    from runs import trained

    for overrides in RUNS:
        trained([*ONE_STEP, *overrides])
    files = {getattr(module, "__file__", None) or "" for module in list(sys.modules.values())}
    return sorted(file for file in files if "/megatron/core/" in file or "/dsplugins/" in file)


def read_in(file: Path) -> set[str]:
    """Names that are read as attributes, by a dot or by `getattr`."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            found.add(node.attr)
        called = isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr")
        if called and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
            found.add(node.args[1].value)
    return found


@pytest.fixture
def fresh():
    """A worker that has imported nothing for other tests."""
    pool = Workers(1)
    yield pool
    pool.stop()


def test_what_no_part_of_a_run_reads_is_refused(fresh):
    import dataclasses

    from megatron.core.transformer.transformer_config import MLATransformerConfig

    from dsplugins.audit.ignored import BY_NAME, NOBODY

    files = [Path(file) for file in fresh.run(sources_of_runs)[0]]
    used = [
        file
        for file in files
        if file.suffix == ".py"
        and file.name not in CONFIGURATIONS
        and not {"audit", *NEVER_BUILT}.intersection(file.parts)
    ]
    assert len(used) > 200
    read = set().union(*map(read_in, used))
    fields = {field.name for field in dataclasses.fields(MLATransformerConfig)}
    refused = [field for table in (BY_NAME, NOBODY) for names in table.values() for field in names]
    assert len(refused) == len(set(refused)) and fields.issuperset(refused)
    unread = fields - read
    assert len(unread) > 50, "it finds those that are known to be unread"
    assert unread - set(refused) == set(TURNED_INTO_OTHERS) | set(OF_A_SCHEDULE)


def asked():
    """Overrides -> what is said, of a field of each reason."""
    from audit.provoke import unaudited, verdict

    found = {}
    for override in (
        "moe_deepep_num_sms=7",
        "mamba_state_dim=64",
        "use_te_rng_tracker=true",
        "mup_width_mult=2.0",
    ):
        with unaudited(f"model.{override}") as run:
            found[override] = verdict(run)
    return found


def test_they_are_told_by_name_and_reason(workers):
    (found,) = workers(1).run(asked)
    for override, said in {
        "moe_deepep_num_sms=7": "model.moe_deepep_num_sms=7 has no effect: megatron-core reads it nowhere",
        "mamba_state_dim=64": "model.mamba_state_dim=64 has no effect: mla decides in the slot attention",
        "use_te_rng_tracker=true": "has no effect: the loop makes process groups without it",
        "mup_width_mult=2.0": "model.mup_width_mult=2.0 has no effect: all weights",
    }.items():
        assert any(said in line for line in found[override]), found
