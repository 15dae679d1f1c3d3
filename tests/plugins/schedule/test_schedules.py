"""Schedules: which function of core they give, what they refuse, and that gradients come out right."""

from types import SimpleNamespace

import pytest

from dsplugins.contracts import Layout
from dsplugins.plugins.schedule.interleaved import Interleaved, InterleavedOptions, InterleavedSchedule
from dsplugins.plugins.schedule.one_f_one_b import OneFOneB
from dsplugins.testing import model_parallel, prepare_cpu


def make_plan(**layout):
    return SimpleNamespace(layout=Layout(**layout))


def interleaved(group=None):
    return Interleaved(InterleavedOptions(group=group))


@pytest.mark.parametrize(
    ("plugin", "layout", "name"),
    [
        (OneFOneB(), {}, "forward_backward_no_pipelining"),
        (OneFOneB(), {"pipeline": 2}, "forward_backward_pipelining_without_interleaving"),
        (
            interleaved(),
            {"pipeline": 2, "virtual_pipeline": 2},
            "forward_backward_pipelining_with_interleaving",
        ),
    ],
)
def test_core_would_choose_the_same_function(plugin, layout, name):
    prepare_cpu()
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    plan = make_plan(**layout)
    schedule = plugin.ds_schedule(plan=plan)
    chunks = plan.layout.virtual_pipeline
    assert schedule.chunks == chunks
    assert schedule.forward_backward().__name__ == name
    core = get_forward_backward_func(pp_size=plan.layout.pipeline, vp_size=chunks if chunks > 1 else None)
    assert schedule.forward_backward() is core
    assert schedule.finalize_grads() is finalize_model_grads


def keys(plugin, **layout):
    return [problem.key for problem in plugin.ds_check(plan=make_plan(**layout), settings=None)]


def test_layouts_that_do_not_fit_are_problems():
    assert keys(OneFOneB(), pipeline=2) == []
    assert keys(OneFOneB(), pipeline=2, virtual_pipeline=2) == ["parallel.virtual_pipeline"]
    assert keys(interleaved(), pipeline=2, virtual_pipeline=2) == []
    assert keys(interleaved(), pipeline=2) == ["parallel.virtual_pipeline"]
    assert keys(interleaved()) == ["parallel.pipeline", "parallel.virtual_pipeline"]
    assert keys(interleaved(3), pipeline=4, virtual_pipeline=2) == ["plugins.interleaved.group"]


def test_settings_of_each():
    settings = interleaved(24).ds_settings(plan=make_plan(pipeline=16, virtual_pipeline=2))
    assert settings["model.microbatch_group_size_per_vp_stage"] == 24
    assert settings["model.overlap_p2p_comm"] and not settings["model.batch_p2p_comm"]
    default = interleaved().ds_settings(plan=make_plan(pipeline=16, virtual_pipeline=2))
    assert default["model.microbatch_group_size_per_vp_stage"] == 16
    assert OneFOneB().ds_settings(plan=make_plan())["model.overlap_p2p_comm"] is False


def test_v3s_ramp_of_batch_sizes_fits_one_group_only():
    """24 to 120 micro-batches at 128 data-parallel ranks, 16 stages."""
    fits = {
        group: [m for m in range(24, 121) if InterleavedSchedule(16, 2, group).refuses(m) is None]
        for group in (16, 20, 24, 30, 32, 40)
    }
    assert [group for group, counts in fits.items() if 24 in counts and 120 in counts] == [24]
    assert len(fits[24]) == 37
    assert "leave 8" in InterleavedSchedule(16, 2, 16).refuses(24)
    assert "fewer than a group" in InterleavedSchedule(2, 2, 4).refuses(3)
    assert OneFOneB().ds_schedule(plan=make_plan(pipeline=16)).refuses(1) is None


LAYERS, WIDTH, LENGTH, BATCH = 4, 8, 6, 2


def make_layer(number):
    import torch

    torch.manual_seed(number)
    return torch.nn.Linear(WIDTH, WIDTH)


def sample(number):
    import torch

    return torch.randn(LENGTH, BATCH, WIDTH, generator=torch.Generator().manual_seed(number))


def reference(microbatches):
    """Gradient of each layer's weight, all layers in one process."""
    import torch

    layers = [make_layer(number) for number in range(LAYERS)]
    for number in range(microbatches):
        x = sample(number)
        for layer in layers:
            x = x + torch.tanh(layer(x))
        (x.square().mean() / microbatches).backward()
    return {number: layer.weight.grad for number, layer in enumerate(layers)}


def make_chunk(config, first, layers):
    import torch
    from megatron.core.enums import ModelType
    from megatron.core.transformer.module import MegatronModule

    class Chunk(MegatronModule):
        def __init__(self):
            super().__init__(config)
            self.layers = torch.nn.ModuleDict({str(number): make_layer(number) for number in layers})
            self.received, self.model_type = None, ModelType.encoder_or_decoder

        def set_input_tensor(self, tensor):
            self.received = tensor[0] if isinstance(tensor, list) else tensor

        def forward(self, x):
            x = x if first else self.received
            for layer in self.layers.values():
                x = x + torch.tanh(layer(x))
            return x

    return Chunk()


def gradients(plugin, layout, microbatches):
    """Gradient of each layer's weight on this rank, by the schedule under test."""
    import torch
    from megatron.core import parallel_state as ps
    from megatron.core.transformer import TransformerConfig

    plan = make_plan(**layout)
    stages, chunks = plan.layout.pipeline, plan.layout.virtual_pipeline
    settings = {key.split(".")[1]: value for key, value in plugin.ds_settings(plan=plan).items()}
    with model_parallel(pipeline=stages, virtual_pipeline=chunks):
        config = TransformerConfig(
            num_layers=LAYERS, hidden_size=WIDTH, num_attention_heads=1, pipeline_dtype=torch.float32,
            pipeline_model_parallel_size=stages, batch_p2p_sync=False,
            virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None, **settings,
        )  # fmt: skip
        config.variable_seq_lengths = False
        each = LAYERS // (stages * chunks)
        starts = [(chunk * stages + ps.get_pipeline_model_parallel_rank()) * each for chunk in range(chunks)]
        model = [make_chunk(config, start == 0, range(start, start + each)) for start in starts]
        schedule = plugin.ds_schedule(plan=plan)
        schedule.forward_backward()(
            forward_step_func=lambda data, chunk: (chunk(next(data)), lambda x: (x.square().mean(), {})),
            data_iterator=[map(sample, range(microbatches)) for _ in model] if chunks > 1
            else map(sample, range(microbatches)),
            model=model if chunks > 1 else model[0], num_microbatches=microbatches, seq_length=LENGTH,
            micro_batch_size=BATCH, decoder_seq_length=LENGTH, forward_only=False,
        )  # fmt: skip
        return {
            int(number): layer.weight.grad for chunk in model for number, layer in chunk.layers.items()
        }  # fmt: skip


@pytest.mark.parametrize(
    ("plugin", "layout", "microbatches"),
    [
        (OneFOneB(), {"pipeline": 2}, 1),
        (OneFOneB(), {"pipeline": 2}, 5),
        (interleaved(), {"pipeline": 2, "virtual_pipeline": 2}, 4),
        (interleaved(3), {"pipeline": 2, "virtual_pipeline": 2}, 5),
    ],
)
def test_gradients_equal_those_of_one_process(workers, plugin, layout, microbatches):
    import torch

    ours = {}
    for part in workers(2).run(gradients, plugin, layout, microbatches):
        ours |= part
    want = reference(microbatches)
    assert sorted(ours) == list(range(LAYERS))
    for number in range(LAYERS):
        torch.testing.assert_close(ours[number], want[number], rtol=1e-5, atol=1e-8)


def test_no_pipeline_accumulates(single):
    import torch

    plugin, want = OneFOneB(), reference(3)
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(num_layers=LAYERS, hidden_size=WIDTH, num_attention_heads=1)
    chunk = make_chunk(config, True, range(LAYERS))
    plugin.ds_schedule(plan=make_plan()).forward_backward()(
        forward_step_func=lambda data, chunk: (chunk(next(data)), lambda x: (x.square().mean(), {})),
        data_iterator=map(sample, range(3)), model=chunk, num_microbatches=3, seq_length=LENGTH,
        micro_batch_size=BATCH, forward_only=False,
    )  # fmt: skip
    for number in range(LAYERS):
        torch.testing.assert_close(chunk.layers[str(number)].weight.grad, want[number])


def test_a_schedule_and_a_layout_hold_as_many_chunks_a_rank():
    """Said by the host where the schedule's own plugin doesn't."""
    from dsplugins.contracts import Problem
    from dsplugins.settings import _other_chunks

    plan = SimpleNamespace(layout=Layout(pipeline=2, virtual_pipeline=1), slots={"schedule": "mine"})
    plugins = SimpleNamespace(slot=lambda name, plan: SimpleNamespace(chunks=2))
    (found,) = _other_chunks(plan, plugins, [])
    assert found.message == "mine holds 2 chunks a rank, parallel.virtual_pipeline is 1"
    assert not list(_other_chunks(plan, plugins, [Problem("said", "parallel.virtual_pipeline", "so")]))
    plan.layout = Layout(pipeline=2, virtual_pipeline=2)
    assert not list(_other_chunks(plan, plugins, []))
