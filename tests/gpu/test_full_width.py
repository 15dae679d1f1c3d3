"""One V3 MoE layer and one MLA block at full width, with all experts on this GPU, against the equations."""

from __future__ import annotations

import gc
import importlib.util

import pytest

# Every intermediate result is rounded to BF16, 2e-3 each, and the errors of a sum's terms cancel: some 3e-3
# to 6e-3 in all, at any width. A wrong expert, weight or rotation is 1e-1 and more.
BOUND = 1e-2


def holds(facts, experts):
    assert facts["finite"] and facts["counted"] and facts["gradients"]
    assert facts["experts_a_token"] == [8] and facts["groups_a_token"] == 4
    assert facts["busy"] > 0.9 * experts  # else the comparison looks at few of them
    assert facts["output_error"] < BOUND and facts["gradient_error"] < BOUND, facts


def test_the_checks_hold_at_tiny_width_on_the_cpu(workers):
    from gpu.full_width import TINY, mla_errors, moe_facts

    backend = ("plugins.te=null", "plugins.torch_local={}")
    (facts,) = workers(1).run(moe_facts, (*backend, *TINY))
    assert facts["tokens"] == 128
    holds(facts, experts=32)
    (errors,) = workers(1).run(mla_errors, (*backend, *TINY))
    assert len(errors) == 9 and max(errors.values()) < BOUND, errors


def free(needed):
    """Skip, by name, on a card that is too small."""
    import torch

    gc.collect()  # the layer of the test before
    torch.cuda.empty_cache()
    available = torch.cuda.mem_get_info()[0]
    if available < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of GPU memory, {available / 2**30:.0f} are free")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch_local", "te"])
def test_moe_layer(nccl, backend):
    from gpu.full_width import moe_facts

    from dsplugins.experiments.gpu import NEEDED, Way, changes

    if backend == "te" and importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("transformer_engine is not installed here")
    free(NEEDED)
    facts = moe_facts(changes(Way("moe_layer", backend)))
    assert facts["tokens"] == 4096
    holds(facts, experts=256)


@pytest.mark.gpu
def test_mla_block(nccl):
    from gpu.full_width import mla_errors

    from dsplugins.experiments.gpu import Way, changes

    free(8 * 2**30)
    errors = mla_errors([*changes(Way("mla_block", "torch_local")), "data.seq_length=128"])
    assert max(errors.values()) < BOUND, errors
