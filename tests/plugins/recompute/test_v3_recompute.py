"""Recomputation changes no bit and gives memory back."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
from torch.utils import cpp_extension

from dsplugins.plugins.recompute import extension
from dsplugins.plugins.recompute.v3_recompute import V3Recompute, V3RecomputeOptions
from dsplugins.words import size

NORMS_ONLY = V3RecomputeOptions(mla_up_proj=False)


@pytest.fixture(autouse=True)
def fresh_mtp_log():
    """Core keeps MTP's losses in a table of the class, as long as the first model's chain was."""
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    MTPLossLoggingHelper.tracker.clear()
    yield
    MTPLossLoggingHelper.tracker.clear()


def model(recompute: V3Recompute | None, depth: int = 1, attention: str = "mla", **changes):
    """A tiny V3 in training mode, the same weights every time."""
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from oracles.tiny import build_tiny, tiny_config

    from dsplugins.plugins.attention.gqa import Gqa
    from dsplugins.plugins.attention.mla import Mla
    from dsplugins.plugins.mtp.mtp import Mtp, MtpOptions
    from dsplugins.weights import initialise

    model_parallel_cuda_manual_seed(1234)
    if attention == "gqa":
        changes |= {"multi_latent_attention": False, "qk_layernorm": False, "num_query_groups": 2}
    if depth:
        changes |= {"mtp_num_layers": depth, "mtp_loss_scaling_factor": 0.3}
    if recompute is not None:
        settings = recompute.ds_settings(SimpleNamespace())
        changes |= {key.removeprefix("model."): value for key, value in settings.items()}
    config = tiny_config(**changes)
    mtp = Mtp(MtpOptions(depth=depth)) if depth else None
    built = build_tiny(config, {"mla": Mla(), "gqa": Gqa()}[attention], mtp)
    initialise([built], seed=5, std=0.1)
    if recompute is not None:
        assert recompute.ds_recompute(config, built) is True
    return built


def losses(built, seed: int = 0) -> torch.Tensor:
    from oracles.tiny import tokens

    ids, positions = tokens(seed=seed)
    return built(ids, positions, None, labels=ids.roll(-1, 1), loss_mask=torch.ones(ids.shape))


def step(built) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Two micro-batches in flight, as in a pipeline: both forwards, then both backwards."""
    built.zero_grad()
    first, second = losses(built, 0), losses(built, 1)
    first.mean().backward()
    second.mean().backward()
    return torch.stack([first, second]).detach(), {n: p.grad.clone() for n, p in built.named_parameters()}


def held_bytes(built) -> int:
    """Memory that autograd holds after a forward pass, parameters left out, each storage once."""
    kept: list[torch.Tensor] = []
    own = {p.untyped_storage().data_ptr() for p in built.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        result = losses(built)
    storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in kept}
    total = sum(s.nbytes() for s in storages.values() if s.data_ptr() not in own)
    result.mean().backward()
    return total


CASES = {
    "v3": {},
    "no_mtp": {"depth": 0},
    "two_mtp_blocks": {"depth": 2},
    "no_q_lora": {"q_lora_rank": None},
    "gqa": {"attention": "gqa"},
}


@pytest.mark.parametrize("case", CASES)
def test_every_bit_stays(single, case):
    expected_losses, expected = step(plain := model(None, **CASES[case]))
    built = model(V3Recompute(NORMS_ONLY), **CASES[case])
    for _ in range(2):  # the first call of each module is checked, the second is not
        got_losses, got = step(built)
        assert torch.equal(got_losses, expected_losses)
        assert set(got) == set(expected)
        for name in expected:
            assert torch.equal(got[name], expected[name]), name
    assert built.state_dict().keys() == plain.state_dict().keys()


def test_the_reported_bytes_are_really_gone(single):
    before = held_bytes(model(None))
    built = model(V3Recompute(NORMS_ONLY))
    after = held_bytes(built)
    report = built.ds_recompute_report
    assert before - after == report.avoided_bytes > 0
    print(f"{before:,} -> {after:,} bytes, {report.norms} norms")


def test_a_run_tells_what_it_saved(single):
    plugin = V3Recompute(NORMS_ONLY)
    built = model(plugin)
    assert plugin.ds_run_end() == {}, "nothing has run"
    losses(built)
    (said,) = plugin.ds_run_end().values()
    assert f"the outputs of {built.ds_recompute_report.norms} norms" in said
    assert said.startswith(size(built.ds_recompute_report.avoided_bytes))


def test_every_norm_is_reached(single):
    """Input, pre-MLP, both latents, final, and MTP's: `eh_proj` reads enorm and hnorm, the head the rest."""
    built = model(V3Recompute(NORMS_ONLY))
    losses(built)
    layer = (
        "input_layernorm",
        "pre_mlp_layernorm",
        "self_attention.q_layernorm",
        "self_attention.kv_layernorm",
    )
    inner = [f"decoder.layers.{i}.{name}" for i in range(3) for name in layer]
    inner += [f"mtp.layers.0.mtp_model_layer.{name}" for name in layer]
    assert set(built.ds_recompute_report.avoided) == {
        *inner, "decoder.final_layernorm", "mtp.layers.0.eh_proj", "mtp"
    }  # fmt: skip


def test_evaluation_is_left_alone(single):
    built = model(V3Recompute(NORMS_ONLY))
    with torch.no_grad():
        losses(built)
    assert built.ds_recompute_report.avoided == {}


def test_survives_an_exception_inside_a_layer(single):
    built = model(V3Recompute(NORMS_ONLY))
    expected, _ = step(built)
    breaking = built.decoder.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        losses(built)
    breaking.remove()
    assert torch.equal(step(built)[0], expected)


def test_a_norm_that_comes_out_differently_is_refused(single):
    built = model(V3Recompute(NORMS_ONLY))
    norm = built.decoder.layers[0].input_layernorm
    exact = norm.forward
    norm.forward = lambda x: exact(x) + torch.rand(())
    with pytest.raises(RuntimeError, match="layers.0.input_layernorm doesn't come out the same"):
        losses(built)


@pytest.mark.slow  # the first time on a machine: core compiles an extension
def test_with_the_up_projection(single):
    """Core's own recomputation of queries, keys and values on top: still every bit."""
    expected_losses, expected = step(model(None))
    got_losses, got = step(model(V3Recompute(V3RecomputeOptions())))
    assert torch.equal(got_losses, expected_losses)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def on_two_ranks(layout: str) -> dict[str, bool]:
    """Is everything the same with and without recomputation, in a real schedule of three micro-batches?"""
    from dsplugins.testing import model_parallel

    changes = {
        "tensor": {"tensor_model_parallel_size": 2},
        "pipeline": {
            "pipeline_model_parallel_size": 2,
            "num_layers": 4,
            "moe_layer_freq": [0, 1, 1, 1],
            "pipeline_dtype": torch.float32,
            "deallocate_pipeline_outputs": True,
        },
    }[layout]
    with model_parallel(**{layout: 2}):
        expected = scheduled(model(None, **changes))
        built = model(V3Recompute(NORMS_ONLY), **changes)
        scheduled(built)
        built.zero_grad()
        got = scheduled(built)
    equal = {name: torch.equal(got[name], expected[name]) for name in expected}
    return equal | {"avoided": built.ds_recompute_report.avoided_bytes > 0}


def scheduled(built) -> dict[str, torch.Tensor]:
    """Losses and gradients of one run of megatron's own schedule for this layout."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def forward(numbers, chunk):
        return losses(chunk, next(numbers)), lambda loss: (loss.mean(), {"loss": loss.detach().clone()})

    told = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iter(range(3)),
        model=built,
        num_microbatches=3,
        seq_length=16,
        micro_batch_size=2,
        decoder_seq_length=16,
        forward_only=False,
    )
    named = {f"loss {i}": value["loss"] for i, value in enumerate(told)}
    return named | {name: p.grad.clone() for name, p in built.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("layout", ["tensor", "pipeline"])
def test_every_bit_stays_on_two_ranks(workers, layout):
    for equal in workers(2).run(on_two_ranks, layout):
        assert len(equal) > 20
        assert [name for name, same in equal.items() if not same] == []


def problems(options: V3RecomputeOptions = NORMS_ONLY, **changes) -> list[str]:
    from oracles.tiny import tiny_config

    settings = SimpleNamespace(model=tiny_config(**changes))
    return [p.message for p in V3Recompute(options).ds_check(SimpleNamespace(), settings)]


def test_problems(monkeypatch, tmp_path):
    assert problems() == []
    assert (
        "recompute_modules" in problems(recompute_granularity="selective", recompute_modules=["layernorm"])[0]
    )
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    assert "recompute_granularity" in problems(**full)[0]
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = extension.folder() / "lock"
    lock.parent.mkdir()
    lock.touch()
    assert not problems(V3RecomputeOptions(), multi_latent_attention=True)  # someone is building
    os.utime(lock, (0, 0))
    monkeypatch.delattr(cpp_extension, "FileBaton", raising=False)
    assert not problems(V3RecomputeOptions(), multi_latent_attention=True)  # torch asks the kernel
    monkeypatch.setattr(cpp_extension, "FileBaton", object, raising=False)
    assert f"left {lock}" in problems(V3RecomputeOptions(), multi_latent_attention=True)[0]
    lock.unlink()
    monkeypatch.setenv("PATH", "/nowhere")
    assert "ninja" in problems(V3RecomputeOptions(), multi_latent_attention=True)[0]
    dense = {"multi_latent_attention": False, "qk_layernorm": False}
    assert "needs latent attention" in problems(V3RecomputeOptions(), **dense)[0]
