"""MLA's core attention, 192 wide and 128 for values, through every kernel of torch against math in FP32."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

# In BF16 the weights of a softmax and the result are rounded, 2e-3 each; gradients pass through both twice.
BOUND = 1e-2


def by_torch(query, key, value, mask, attn_mask_type):
    """As the plugin calls torch on CUDA; on the CPU it has an attention of its own."""
    import torch

    heads = [tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)]
    output = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
    return output.permute(2, 0, 1, 3).flatten(2)


def on_the_cpu():
    """Errors of the plugin's attention, and of each path of torch; text where torch has no kernel."""
    from gpu.full_width import TINY, built

    from dsplugins.experiments import gpu_attention as kernels

    with built(["plugins.te=null", "plugins.torch_local={}", *TINY]) as layer:
        given, found = kernels.inputs(layer), {}
        exact, core = kernels.reference(given), layer.module.self_attention.core_attention
        own = kernels.errors(kernels.passes(core, kernels.OWN, given), exact)
        for path in kernels.PATHS:
            try:
                found[path] = kernels.errors(kernels.passes(by_torch, path, given), exact)
            except RuntimeError as error:
                found[path] = str(error)
        return own, found


def test_paths_are_really_chosen_on_the_cpu(workers):
    """Torch has the math kernel there, and none of cuDNN."""
    ((own, found),) = workers(1).run(on_the_cpu)
    assert len(own) == 4 and max(own.values()) < BOUND
    assert max(found["math"].values()) < BOUND
    assert "No viable backend" in found["cudnn"] and "No viable backend" in found["mem_efficient"]


def missing(path):
    """Why torch has no such kernel for these sizes on this card, or None."""
    from dsplugins import cudnn

    if path == "cudnn":
        for problem in cudnn.attention("attention", SimpleNamespace(slots={"platform": "cuda"})):
            return f"{problem.message}: {problem.remedy}"
    return None


@pytest.mark.gpu
@pytest.mark.parametrize("path", ["its own choice", "cudnn", "mem_efficient", "math"])
def test_path_against_math_in_fp32(nccl, path):
    from gpu.full_width import built

    from dsplugins.experiments import gpu_attention as kernels
    from dsplugins.experiments.gpu import Way, changes
    from dsplugins.experiments.gpu_layer import FEW

    if reason := missing(path):
        pytest.skip(reason)
    line = [*FEW, *changes(Way("attention", "torch_local")), "data.seq_length=1024"]
    with built(line) as layer:
        core, given = layer.module.self_attention.core_attention, kernels.inputs(layer)
        assert [tensor.shape[-1] for tensor in given[:3]] == [192, 192, 128]
        errors = kernels.errors(kernels.passes(core, path, given), kernels.reference(given))
    assert max(errors.values()) < BOUND, errors
