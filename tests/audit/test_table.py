"""The table of what was built."""

from __future__ import annotations

from dataclasses import asdict

from audit.provoke import BF16
from runs import SEQUENTIAL

DENSE = {
    "layers": "decoder.0",
    "attention": "LatentAttention",
    "core_attention": "SdpaCoreAttention",
    "linears": "ColumnParallelLinear RowParallelLinear",
    "norms": "RMSNorm",
    "mlp": "MLP",
    "router": "",
    "experts": "",
    "shared_experts": "",
    "dispatcher": "",
    "dtype": "float32",
}
MOE = DENSE | {
    "layers": "decoder.1-3, mtp.0",
    "mlp": "HostMoELayer",
    "router": "AuxFreeRouter",
    "experts": "GroupedExperts",
    "shared_experts": "SharedExpertMLP",
    "dispatcher": "AllToAllDispatcher",
}


def tables(*overrides: str) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Of this rank, and of the whole pipeline."""
    from audit.provoke import unaudited

    from dsplugins import audit

    with unaudited(*overrides) as run:
        config = run.settings.model
        return tuple(
            [asdict(kind) for kind in look(config, run.chunks)]
            for look in (audit.describe, audit.describe_run)
        )


def test_one_line_for_each_kind(workers):
    assert workers(1).run(tables)[0] == ([DENSE, MOE], [DENSE, MOE])


def test_it_follows_the_choice(workers):
    (_, (dense, moe)) = workers(1).run(tables, *BF16, *SEQUENTIAL)[0]
    assert dense == DENSE | {"dtype": "bfloat16"}
    assert moe == MOE | {"dtype": "bfloat16", "experts": "SequentialExperts"}


def test_every_rank_can_tell_the_whole_pipeline(workers):
    (first, whole), (second, same) = workers(2).run(tables, "parallel.pipeline=2")
    assert first == [DENSE, MOE | {"layers": "decoder.1"}]
    assert second == [MOE | {"layers": "decoder.2-3, mtp.0"}]
    assert whole == same == [DENSE, MOE]


def test_ranges_of_layers():
    from dsplugins.audit.table import span

    names = [*(f"decoder.{i}" for i in (0, 2, 3, 4, 10)), "mtp.0", "mtp.1", "decoder.final_layernorm"]
    assert span(names) == "decoder.0, decoder.2-4, decoder.10, mtp.0-1, decoder.final_layernorm"
