"""torch.cuda led to the CPU: what megatron-core asks is answered, and nothing of it is touched."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from dsplugins.testing import model_parallel, prepare_cpu


@pytest.fixture(autouse=True, scope="module")
def redirected():
    prepare_cpu()


SNAPSHOT = """
import importlib, sys
for name in ("tensor_parallel.random", "optimizer", "distributed", "pipeline_parallel.schedules",
             "models.gpt.gpt_model", "transformer.moe.moe_layer", "dist_checkpointing"):
    importlib.import_module("megatron.core." + name)

def shot():
    seen = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "megatron":
            for key, value in vars(module).items():
                seen[name, key] = id(value)
                if isinstance(value, type) and value.__module__ == name:
                    seen.update({(name, key, part): id(thing) for part, thing in vars(value).items()})
    return seen

before = shot()
from dsplugins.cuda_redirect import install
install()
after = shot()
assert len(before) > 5000, len(before)
changed = [key for key in before.keys() | after.keys() if before.get(key) != after.get(key)]
assert not changed, changed
# installed after megatron: the random state is restored all the same
import torch
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
tracker = CudaRNGStatesTracker()
torch.manual_seed(0)
tracker.add("a", 5)
with tracker.fork("a"):
    inside = torch.rand(3)
assert torch.equal(inside, torch.rand(3, generator=torch.Generator().manual_seed(5)))
assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(0)))
"""


def test_no_megatron_attribute_changes():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", SNAPSHOT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("device", ["cuda", "cuda:1", 0])
def test_factories_answer_with_the_cpu(device):
    import torch

    assert torch.zeros(2, device=device).device.type == "cpu"
    assert torch.tensor([1.0], device=torch.device("cuda")).device.type == "cpu"
    assert torch.empty_like(torch.ones(1), device=device).device.type == "cpu"
    assert torch.empty(3, device=torch.cuda.current_device(), pin_memory=True).device.type == "cpu"
    assert torch.zeros(2, device="meta").device.type == "meta"
    with torch.device("meta"):
        assert torch.zeros(2).device.type == "meta"


def test_every_listed_factory_is_wrapped_once():
    import torch

    from dsplugins import cuda_redirect

    before = {name: getattr(torch, name) for name in cuda_redirect.FACTORIES} | dict(vars(torch.cuda))
    cuda_redirect.install()
    after = {name: getattr(torch, name) for name in cuda_redirect.FACTORIES} | dict(vars(torch.cuda))
    assert before == after
    assert not hasattr(torch.zeros.__wrapped__, "__wrapped__")


def test_a_gpu_is_refused(monkeypatch):
    import torch

    from dsplugins import cuda_redirect

    monkeypatch.setattr(cuda_redirect, "installed", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="CUDA_VISIBLE_DEVICES"):
        cuda_redirect.install()


def test_tensors_and_modules_stay_where_they_are():
    import torch

    tensor, module = torch.ones(2), torch.nn.Linear(2, 2)
    assert tensor.cuda() is tensor and tensor.pin_memory() is tensor and module.cuda() is module
    assert tensor.record_stream(torch.cuda.current_stream()) is None
    assert tensor.type() == "torch.cuda.FloatTensor"
    assert tensor.bfloat16().type() == "torch.cuda.BFloat16Tensor"
    assert tensor.type(torch.int64).dtype == torch.int64
    assert tensor.long().type() == "torch.LongTensor"


def test_streams_events_and_memory_answer():
    import torch

    with torch.cuda.stream(torch.cuda.Stream()):
        event = torch.cuda.current_stream().record_event()
    torch.cuda.current_stream().wait_event(event)
    torch.cuda.nvtx.range_push("x")
    torch.cuda.nvtx.range_pop()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    assert event.query()
    assert torch.cuda.max_memory_allocated() == 0 and torch.cuda.memory_stats() == {}


def python_calls(statement):
    """How many Python functions a statement enters, below the one that makes it."""
    entered = []
    sys.setprofile(lambda frame, event, _: entered.append(frame.f_code.co_name) if event == "call" else None)
    try:
        statement()
    finally:
        sys.setprofile(None)
    return entered[1:]


def test_a_factory_costs_two_python_calls_at_most_and_an_operator_none():
    # Counted, not timed: a loaded machine changes seconds, never this.
    import torch

    one = torch.ones(2)
    assert python_calls(lambda: torch.zeros(2, dtype=torch.float32)) == ["on_stand_in"]
    assert python_calls(lambda: torch.zeros(2, device="cpu")) == ["on_stand_in", "_is_cuda"]
    assert python_calls(lambda: (one + one).mul_(2).to(torch.float32)) == []


def test_the_tracker_forks_saves_and_restores(single, caplog):
    import torch
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    tracker = get_cuda_rng_tracker()
    saved = {name: state.clone() for name, state in tracker.get_states().items()}
    torch.manual_seed(7)
    with tracker.fork():
        first = torch.rand(4)
    outside = torch.rand(4)
    with tracker.fork():
        second = torch.rand(4)
    assert torch.equal(outside, torch.rand(4, generator=torch.Generator().manual_seed(7)))
    assert not torch.equal(first, second)
    tracker.set_states(saved)
    with tracker.fork():
        assert torch.equal(torch.cat([torch.rand(4), torch.rand(4)]), torch.cat([first, second]))
    assert not caplog.records, "the shared state is no news on a CPU"


def test_recomputed_dropout_is_the_same(single):
    import torch
    from megatron.core import tensor_parallel

    def gradient(checkpointed):
        torch.manual_seed(3)
        x = torch.ones(64, requires_grad=True)
        drop = torch.nn.functional.dropout
        y = tensor_parallel.checkpoint(drop, False, x) if checkpointed else drop(x)
        torch.rand(10)  # something else draws before backward
        y.sum().backward()
        return x.grad, torch.rand(1)

    plain, after_plain = gradient(False)
    again, after_again = gradient(True)
    assert torch.equal(plain, again) and plain.unique().numel() == 2
    assert torch.equal(after_plain, after_again)


def train_with_core(bf16, steps):
    """megatron's DDP and distributed optimizer over two ranks, against torch's AdamW."""
    import torch
    import torch.distributed as dist
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import MegatronModule

    class Toy(MegatronModule):
        def __init__(self, config):
            super().__init__(config)
            self.linear = torch.nn.Linear(8, 8, bias=False, dtype=config.params_dtype)

    dtype = torch.bfloat16 if bf16 else torch.float32
    with model_parallel():
        torch.manual_seed(0)
        config = TransformerConfig(
            num_layers=1, hidden_size=8, num_attention_heads=1, bf16=bf16, params_dtype=dtype
        )
        chunk = Toy(config)
        weight = chunk.linear.weight.detach().float().clone().requires_grad_()
        ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
        model = DistributedDataParallel(config, ddp_config, chunk)
        options = OptimizerConfig(
            optimizer="adam", lr=0.1, weight_decay=0.1, clip_grad=0.5, adam_eps=1e-8, bf16=bf16,
            params_dtype=dtype, use_distributed_optimizer=True,
        )  # fmt: skip
        optimizer = get_megatron_optimizer(options, [model])
        reference = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.1, betas=(0.9, 0.999), eps=1e-8)
        norms = []
        for step in range(steps):
            x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(step)).to(dtype)
            model.zero_grad_buffer()
            optimizer.zero_grad()
            chunk.linear(x[dist.get_rank()]).float().square().mean().backward()
            model.finish_grad_sync()
            norms.append(optimizer.step()[1])
            reference.zero_grad()
            (x.float() @ weight.T).square().mean().backward()
            torch.nn.utils.clip_grad_norm_([weight], 0.5)
            reference.step()
        return chunk.linear.weight.detach().float(), weight.detach(), [float(norm) for norm in norms]


@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 1e-5), (True, 3e-2)])
def test_core_trains_with_its_own_optimizer(workers, bf16, tolerance):
    import torch

    results = workers(2).run(train_with_core, bf16, 3)
    for ours, reference, norms in results:
        torch.testing.assert_close(ours, reference, atol=tolerance, rtol=tolerance)
        assert len(norms) == 3 and min(norms) > 0
    assert torch.equal(results[0][0], results[1][0])


def test_streams_are_context_managers():
    from dsplugins.cuda_redirect import Event, Stream

    given = Event()
    with Stream() as stream:
        assert stream.record_event(given) is given
    assert given.elapsed_time(SimpleNamespace()) == 0.0
