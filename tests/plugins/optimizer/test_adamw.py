"""AdamW: torch's arithmetic inside megatron-core's wrappers, in every mode, through saving and loading."""

import copy
import math
import sys
from pathlib import Path

import pytest
import torch

from dsplugins.contracts import DataOptions, Evaluate, Layout, Plan, RunOptions, Save, Settings

NUMBERS = {"adam_beta1": 0.9, "adam_beta2": 0.95, "adam_eps": 1e-8, "weight_decay": 0.1}
RATES = (1e-2, 2e-2, 5e-3, 1e-2, 1e-2)
NAMES = ("expert", "embedding.weight", "norm.weight", "linear.weight", "linear.bias")


def toy(dtype=torch.float32, router=None):
    """A module with every kind of parameter: two matrices, a gain, a bias, an expert's weight."""
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import MegatronModule

    class Toy(MegatronModule):
        def __init__(self, config):
            super().__init__(config)
            generator = torch.Generator().manual_seed(7)
            self.embedding = torch.nn.Embedding(33, 16, dtype=dtype)
            self.norm = torch.nn.RMSNorm(16, dtype=dtype)
            self.linear = torch.nn.Linear(16, 24, dtype=dtype)
            if router is not None:
                self.router = torch.nn.Linear(16, 4, bias=False, dtype=router)
            self.expert = torch.nn.Parameter(torch.empty(3, 16, 5, dtype=dtype))
            self.expert.allreduce = False
            with torch.no_grad():
                for parameter in self.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))

    config = TransformerConfig(
        num_layers=1, hidden_size=16, num_attention_heads=1, bf16=dtype == torch.bfloat16, params_dtype=dtype
    )
    return Toy(config)


def build(dtype=torch.float32, zero=True, module=None, clip=0.0, **options):
    """(DDP-wrapped chunk, optimizer) as a run makes them from the plugin's own settings."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig

    from dsplugins.plugins.optimizer.adamw import AdamW, AdamWOptions

    plugin = AdamW(AdamWOptions(zero=zero, **options))
    fields = {"optimizer": {"bf16": dtype == torch.bfloat16, "clip_grad": clip, **NUMBERS}, "ddp": {}}
    for key, value in plugin.ds_settings(plan=None).items():
        section, field = key.split(".")
        fields[section][field] = value
    module = module or toy(dtype)
    chunk = DistributedDataParallel(module.config, DistributedDataParallelConfig(**fields["ddp"]), module)
    chunk.broadcast_params()
    return chunk, plugin.ds_optimizer(config=OptimizerConfig(**fields["optimizer"]), chunks=[chunk])


def gradients(step, parameters, scale=1.0):
    """The same on every rank and in every mode: a function of step and order alone."""
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(p.shape, generator=generator) * scale for p in parameters]


def train(chunk, optimizer, steps, scale=1.0):
    """Steps with given gradients, at RATES; the gradient norms."""
    norms = []
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = RATES[step]
        chunk.zero_grad_buffer()
        optimizer.zero_grad()
        parameters = list(chunk.module.parameters())
        for parameter, gradient in zip(parameters, gradients(step, parameters, scale), strict=True):
            parameter.main_grad.copy_(gradient)
        ok, norm, _ = optimizer.step()
        assert ok
        norms.append(float(norm))
    return norms


def weights(chunk):
    return [p.detach().clone() for p in chunk.module.parameters()]


def reference(steps, scale=1.0, clip=0.0, decays=lambda p: p.ndim > 1, fused=True):
    """The same steps by torch.optim.AdamW alone, in FP32."""
    parameters = [p.detach().clone().requires_grad_() for p in toy().parameters()]
    groups = [
        {"params": [p for p in parameters if decays(p)], "weight_decay": 0.1},
        {"params": [p for p in parameters if not decays(p)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8, fused=fused)
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = RATES[step]
        for parameter, gradient in zip(parameters, gradients(step, parameters, scale), strict=True):
            parameter.grad = gradient
        if clip:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
    return [p.detach() for p in parameters]


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("fused", [None, True, False])
def test_fp32_is_torch_adamw_to_the_bit(single, zero, fused):
    chunk, optimizer = build(zero=zero, fused=fused)
    train(chunk, optimizer, range(5))
    expected = reference(range(5), fused=fused is not False)
    for name, ours, theirs in zip(NAMES, weights(chunk), expected, strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("zero", [True, False])
def test_inner_class_is_torchs_own(single, zero):
    from dsplugins.optimizer_groups import leaves

    parts = list(leaves(build(zero=zero)[1]))
    assert len(parts) == 2  # dense and experts
    assert all(type(part.optimizer) is torch.optim.AdamW for part in parts)


def test_installed_fused_adam_does_not_decide(single, monkeypatch):
    """With Transformer Engine or Apex present megatron-core makes their FusedAdam; ours still stands."""
    import megatron.core.optimizer as core

    class FusedAdam(torch.optim.SGD):
        def __init__(self, params, lr, weight_decay, **kwargs):
            super().__init__(params, lr=lr, weight_decay=weight_decay)

    monkeypatch.setattr(core, "USING_PYTORCH_OPTIMIZER", False)
    monkeypatch.setattr(core, "Adam", FusedAdam)
    chunk, optimizer = build()
    train(chunk, optimizer, range(3))
    for name, ours, theirs in zip(NAMES, weights(chunk), reference(range(3)), strict=True):
        assert torch.equal(ours, theirs), name


def test_vectors_do_not_decay(single):
    from dsplugins.optimizer_groups import describe, placements

    chunk, optimizer = build()
    decay = {place.name: place.group["weight_decay"] for place in placements(optimizer, [chunk])}
    assert decay == {
        "0.embedding.weight": 0.1,
        "0.norm.weight": 0.0,
        "0.linear.weight": 0.1,
        "0.linear.bias": 0.0,
        "0.expert": 0.1,
    }
    groups = describe(optimizer, [chunk])
    assert [(g.weight_decay, g.experts, g.moments, g.master) for g in groups] == [
        (0.1, False, ("float32",), ("float32",)),
        (0.0, False, ("float32",), ("float32",)),
        (0.1, True, ("float32",), ("float32",)),
    ]
    assert {name for g in groups for name in g.names} == {f"0.{name}" for name in NAMES}


def test_named_parameters_do_not_decay(single):
    chunk, optimizer = build(no_decay=("embedding.*",))
    train(chunk, optimizer, range(3))
    expected = reference(range(3), decays=lambda p: p.shape != (33, 16))
    for name, ours, theirs in zip(NAMES, weights(chunk), expected, strict=True):
        assert torch.equal(ours, theirs), name


def test_pattern_that_fits_nothing_is_refused(single):
    with pytest.raises(ValueError, match=r"\['\*embeding\*'\]"):
        build(no_decay=("vectors", "*embeding*"))


@pytest.mark.parametrize("zero", [True, False])
def test_clip_is_by_the_norm_of_everything(single, zero):
    chunk, optimizer = build(zero=zero, clip=1.0)
    norms = train(chunk, optimizer, range(3), scale=3.0)
    parameters = list(toy().parameters())
    for step, norm in enumerate(norms):
        expected = math.sqrt(sum(g.double().square().sum().item() for g in gradients(step, parameters, 3.0)))
        assert norm == pytest.approx(expected, rel=1e-6)
    for name, ours, theirs in zip(NAMES, weights(chunk), reference(range(3), 3.0, clip=1.0), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=name)
    # Adam forgives a constant factor, eps apart: what clipping did must show in the moments.
    moment = max(
        s["exp_avg"].abs().max().item() for part in optimizer.chained_optimizers for s in part.state.values()
    )
    assert moment < 0.1


@pytest.mark.parametrize("zero", [True, False])
def test_bf16_model_has_fp32_masters(single, zero):
    from dsplugins.optimizer_groups import placements

    chunk, optimizer = build(torch.bfloat16, zero=zero)
    train(chunk, optimizer, range(5))
    start = [p.float() for p in toy(torch.bfloat16).parameters()]
    masters = {place.name: place.main.clone() for place in placements(optimizer, [chunk])}
    assert {m.dtype for m in masters.values()} == {torch.float32}
    for name, begun, ours in zip(NAMES, start, weights(chunk), strict=True):
        master = masters[f"0.{name}"].view(begun.shape)
        assert torch.equal(master.bfloat16(), ours), name
        assert not torch.equal(master, begun) and not torch.equal(master.bfloat16().float(), master), name


def test_mixed_types_find_their_own_master(single):
    """An FP32 router in a BF16 model: FP32 and BF16 parameters share one group."""
    from dsplugins.optimizer_groups import miscounted, placements

    for zero in (True, False):
        chunk, optimizer = build(torch.bfloat16, zero=zero, module=toy(torch.bfloat16, router=torch.float32))
        for place in placements(optimizer, [chunk]):
            share = place.parameter.detach().flatten()[place.start : place.stop]
            assert torch.equal(share.float(), place.main.detach().flatten()), place.name
        assert miscounted(optimizer, [chunk]) == {}


@pytest.mark.parametrize("zero", [True, False])
def test_bf16_moments_stay_bf16_and_close(single, zero):
    from dsplugins.optimizer_groups import describe

    chunk, optimizer = build(zero=zero, moments="bf16")
    train(chunk, optimizer, [0])
    for ours, theirs in zip(weights(chunk), reference([0], fused=False), strict=True):
        assert torch.equal(ours, theirs)  # the first step sees no rounded moment
    train(chunk, optimizer, range(1, 5))
    assert {group.moments for group in describe(optimizer, [chunk])} == {("bfloat16",)}
    start = list(toy().parameters())
    for begun, ours, theirs in zip(start, weights(chunk), reference(range(5), fused=False), strict=True):
        moved = (theirs - begun).norm()
        error = (ours - theirs).norm() / moved
        assert 0 < error < 0.01


def test_bf16_moments_follow_the_formula():
    """Against the rule written out, with the rounding in between."""
    from dsplugins.plugins.optimizer.bf16_moments import Bf16MomentsAdamW

    parameter = torch.randn(5, 7).requires_grad_()
    expected, first, second = parameter.detach().double(), torch.zeros(5, 7), torch.zeros(5, 7)
    optimizer = Bf16MomentsAdamW([parameter], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(1, 6):
        gradient = torch.randn(5, 7)
        parameter.grad = gradient
        optimizer.step()
        m = 0.9 * first.double() + 0.1 * gradient.double()
        v = 0.95 * second.double() + 0.05 * gradient.double() ** 2
        update = (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
        expected = expected - 0.01 * (0.1 * expected + update)
        first, second = (optimizer.state[parameter][key].clone() for key in ("exp_avg", "exp_avg_sq"))
        torch.testing.assert_close(first.double(), m, rtol=2**-8, atol=1e-30)
        torch.testing.assert_close(second.double(), v, rtol=2**-8, atol=1e-30)
    torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-5, atol=1e-6)


def test_bf16_moments_are_not_widened_by_loading():
    from dsplugins.plugins.optimizer.bf16_moments import Bf16MomentsAdamW

    def one():
        parameter = torch.ones(4).requires_grad_()
        parameter.grad = torch.arange(4.0)
        return parameter, Bf16MomentsAdamW([parameter], lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)

    parameter, optimizer = one()
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    other, loaded = one()
    loaded.load_state_dict(saved)
    for key in ("exp_avg", "exp_avg_sq"):
        assert loaded.state[other][key].dtype == torch.bfloat16
        assert torch.equal(loaded.state[other][key], optimizer.state[parameter][key])

    saved["state"][0]["exp_avg"] = saved["state"][0]["exp_avg"].float()
    with pytest.raises(ValueError, match="plugins.adamw.moments"):
        loaded.load_state_dict(saved)


def resume(zero, **options):
    """Weights after 5 steps, and after 3 steps, a save through core's own state dict, and 2 more."""
    whole, optimizer = build(zero=zero, **options)
    train(whole, optimizer, range(5))

    first, optimizer = build(zero=zero, **options)
    train(first, optimizer, range(3))
    states = [copy.deepcopy(part.optimizer.state_dict()) for part in optimizer.chained_optimizers]
    saved = copy.deepcopy(optimizer.state_dict())
    second, optimizer = build(zero=zero, module=first.module, **options)
    if zero:  # core's state_dict leaves the tensors out; they travel by another way
        for part, state in zip(optimizer.chained_optimizers, states, strict=True):
            part.optimizer.load_state_dict(state)
    optimizer.load_state_dict(saved)
    train(second, optimizer, range(3, 5))
    return weights(whole), weights(second), optimizer


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
@pytest.mark.parametrize("zero", [True, False])
def test_resumed_run_is_the_same_run(single, zero, moments):

    whole, resumed, optimizer = resume(zero, moments=moments)
    for name, ours, theirs in zip(NAMES, resumed, whole, strict=True):
        assert torch.equal(ours, theirs), name
    steps = [s["step"] for part in optimizer.chained_optimizers for s in part.optimizer.state.values()]
    assert [step.item() for step in steps] == [5.0] * 5
    assert len({step.data_ptr() for step in steps}) == 5, "parameters share one counter"
    kinds = {
        s["exp_avg"].dtype for part in optimizer.chained_optimizers for s in part.optimizer.state.values()
    }
    assert kinds == {torch.float32 if moments == "fp32" else torch.bfloat16}


def test_steps_survive_where_transformer_engine_is_installed(single, monkeypatch):
    """core then looks for the counter in the param groups only."""
    import megatron.core.optimizer.distrib_optimizer as core

    monkeypatch.setattr(core, "HAVE_APEX_OR_TE", True)
    monkeypatch.setattr(core, "USING_TE_OPTIMIZER", True)
    monkeypatch.setattr(core, "USING_APEX_OPTIMIZER", False, raising=False)
    whole, resumed, _ = resume(zero=True)
    for ours, theirs in zip(resumed, whole, strict=True):
        assert torch.equal(ours, theirs)


def sharded(zero, moments):
    """One rank's weights after 5 steps, its share of moments, and what `miscounted` says."""
    from dsplugins.optimizer_groups import miscounted, placements
    from dsplugins.testing import model_parallel

    with model_parallel():
        chunk, optimizer = build(zero=zero, clip=1.0, moments=moments)
        norms = train(chunk, optimizer, range(5))
        held = sum(place.stop - place.start for place in placements(optimizer, [chunk]))
        return [w.numpy() for w in weights(chunk)], norms, held, miscounted(optimizer, [chunk])


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_two_ranks_with_zero_are_one(single, workers, moments):
    """ZeRO-1 over two ranks: half of the state each, the weights of one process."""
    chunk, optimizer = build(clip=1.0, moments=moments)
    norms = train(chunk, optimizer, range(5))
    total = sum(p.numel() for p in chunk.parameters())
    held = 0
    for rank_weights, rank_norms, rank_held, wrong in workers(2).run(sharded, True, moments):
        assert rank_norms == pytest.approx(norms, rel=1e-6)
        for name, ours, theirs in zip(NAMES, rank_weights, weights(chunk), strict=True):
            torch.testing.assert_close(torch.from_numpy(ours), theirs, rtol=1e-5, atol=1e-6, msg=name)
        assert wrong == {}
        assert rank_held < total
        held += rank_held
    assert held == total


def test_two_ranks_without_zero_hold_everything(workers):
    total = sum(p.numel() for p in toy().parameters())
    assert [held for _, _, held, _ in workers(2).run(sharded, False, "fp32")] == [total, total]


def plan(**optimizer):
    return Plan(
        name="toy",
        model={},
        optimizer=optimizer,
        ddp={},
        layout=Layout(),
        data=DataOptions(seq_length=8),
        train=None,
        evaluate=Evaluate(),
        save=Save(),
        run=RunOptions(),
        plugins=("adamw",),
        slots={"optimizer": "adamw"},
    )


def problems(options=None, given=None, **fields):
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig

    from dsplugins.plugins.optimizer.adamw import AdamW, AdamWOptions

    config, ddp = OptimizerConfig(**{**NUMBERS, **fields}), DistributedDataParallelConfig()
    settings = Settings(model=None, optimizer=config, ddp=ddp, vocab_size=8)
    plugin = AdamW(AdamWOptions(**(options or {})))
    return [p.key for p in plugin.ds_check(plan=plan(**(given or {})), settings=settings)]


def test_check_finds_what_cannot_work():
    assert problems() == []
    assert problems(adam_beta1=1.0, adam_eps=0.0, weight_decay=-0.1) == [
        "optimizer.adam_beta1",
        "optimizer.adam_eps",
        "optimizer.weight_decay",
    ]
    assert problems(given={"lr": 1e-3}) == ["optimizer.lr"]
    assert problems(optimizer_cpu_offload=True) == ["optimizer.optimizer_cpu_offload"]
    assert problems({"moments": "bf16", "fused": True}) == ["plugins.adamw.fused"]
    assert problems({"moments": "bf16"}, adam_beta2=0.999) == ["optimizer.adam_beta2"]


def test_slow_bf16_moments_would_freeze():
    """Why `ds_check` refuses 0.999: a second moment whose gradient has vanished never decays."""
    stuck = torch.tensor(1.0, dtype=torch.bfloat16)
    assert (stuck.float() * 0.999).bfloat16() == stuck
    from dsplugins.plugins.optimizer.adamw import BF16_STALL

    values = torch.arange(1.0, 2.0, 2**-7)
    assert ((values * BF16_STALL).bfloat16().float() <= values).all()


def test_contradictions_are_refused(single):
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig

    from dsplugins.plugins.optimizer.build import build_optimizer

    module = toy(torch.bfloat16)
    chunk = DistributedDataParallel(module.config, DistributedDataParallelConfig(), module)
    with pytest.raises(ValueError, match="plugins.adamw.zero"):
        build_optimizer(OptimizerConfig(bf16=True, use_distributed_optimizer=True), [chunk])
    with pytest.raises(ValueError, match=r"optimizer\.bf16"):
        build_optimizer(OptimizerConfig(), [chunk])


@pytest.fixture
def nvidias(monkeypatch):
    """A stand-in for NVIDIA's apex; megatron-core isn't told of it."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "nvidia"))
    yield
    for name in set(sys.modules) - before:
        if name.split(".")[0] == "apex" or name.endswith(".apex_adamw"):
            del sys.modules[name]


@pytest.mark.parametrize("zero", [True, False])
def test_apexs_kernel_follows_the_same_formula(single, nvidias, zero):
    chunk, optimizer = build(zero=zero, kernel="apex")
    from apex.optimizers import FusedAdam

    assert all(isinstance(part.optimizer, FusedAdam) for part in optimizer.chained_optimizers)
    train(chunk, optimizer, range(5))
    for name, ours, theirs in zip(NAMES, weights(chunk), reference(range(5)), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-7), name
    states = [s for part in optimizer.chained_optimizers for s in part.optimizer.state.values()]
    assert {state["step"].item() for state in states} == {5.0} and len(states) == 5
    assert not any("step" in g for part in optimizer.chained_optimizers for g in part.optimizer.param_groups)


@pytest.mark.parametrize("zero", [True, False])
def test_a_run_with_apexs_kernel_resumes(single, nvidias, zero):
    whole, resumed, _ = resume(zero, kernel="apex")
    for name, ours, theirs in zip(NAMES, resumed, whole, strict=True):
        assert torch.equal(ours, theirs), name


def test_apex_that_does_not_load_is_told_once(nvidias, monkeypatch):
    """Where nobody asked for it, too: megatron-core takes it for its own optimizer."""
    from dsplugins import apex

    monkeypatch.setattr(apex, "_not_loaded", lambda extension: f"{extension} is of another torch")
    assert problems() == ["plugins.adamw"]
    assert problems({"kernel": "apex"}) == ["plugins.adamw.kernel"]


def test_apexs_kernel_excludes_others(nvidias):
    assert problems({"kernel": "apex", "moments": "bf16"}) == ["plugins.adamw.kernel"]
    assert problems({"kernel": "apex", "fused": True}) == ["plugins.adamw.kernel"]
    assert problems({"kernel": "apex"}) == []
