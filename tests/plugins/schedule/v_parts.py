"""What `v_shape` is made of: the layout, one micro-batch after the other, gradients of embedding copies."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel.schedules import backward_step, deallocate_output_tensor, forward_step
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.utils import get_model_config

from dsplugins.model import bare


class VLayout(PipelineParallelLayerLayout):
    """Stages [2P] in the model's order; chunk 1 of rank r is stage 2P - 1 - r."""

    def __init__(self, stages, ranks):
        super().__init__([*stages[:ranks], *reversed(stages[ranks:])], ranks)
        self.in_order = [[LayerType[name] for name in stage] for stage in stages]
        self.flatten_layout = [kind for stage in self.in_order for kind in stage]

    def get_layer_offset(self, layer_type=LayerType.decoder, vp_stage=None, pp_rank=None):
        rank = parallel_state.get_pipeline_model_parallel_rank() if pp_rank is None else pp_rank
        before = self.in_order[: stage_of(rank, vp_stage, self.pipeline_model_parallel_size)]
        return sum(stage.count(layer_type) for stage in before)


def stage_of(rank, chunk, ranks):
    return rank if chunk == 0 else 2 * ranks - 1 - rank


class Wire:
    """Hidden states and their gradients between neighbouring stages of this rank's pipeline."""

    def __init__(self, config, shape):
        self.group = parallel_state.get_pipeline_model_parallel_group()
        self.rank, self.ranks = self.group.rank(), self.group.size()
        self.config, self.shape, self.kept = config, shape, None

    def holder(self, stage):
        return min(stage, 2 * self.ranks - 1 - stage)

    def give(self, tensor, stage):
        """To `stage`; in the number format of the pipeline, since core widens what the last rank puts out."""
        tensor = tensor.detach().to(self.config.pipeline_dtype)
        if self.holder(stage) == self.rank:
            self.kept = tensor
        else:
            torch.distributed.send(tensor.contiguous(), group=self.group, group_dst=self.holder(stage))

    def take(self, stage):
        """What `stage` gave."""
        if self.holder(stage) == self.rank:
            return self.kept
        tensor = torch.empty(self.shape, dtype=self.config.pipeline_dtype)
        torch.distributed.recv(tensor, group=self.group, group_src=self.holder(stage))
        return tensor


def one_after_the_other(
    *,
    forward_step_func,
    data_iterator,
    model,
    num_microbatches,
    seq_length,
    micro_batch_size,
    forward_only=False,
    collect_non_loss_data=False,
):
    """Each micro-batch down the V and up again, then back: no two stages work at the same time."""
    config, store = get_model_config(model[0]), []
    tensor = parallel_state.get_tensor_model_parallel_world_size() if config.sequence_parallel else 1
    wire = Wire(config, (seq_length // tensor, micro_batch_size, config.hidden_size))
    mine = {stage_of(wire.rank, chunk, wire.ranks): chunk for chunk in range(2)}
    last = 2 * wire.ranks - 1
    for _ in range(num_microbatches):
        passed = {}
        for stage, chunk in sorted(mine.items()):
            given = wire.take(stage - 1).requires_grad_() if stage else None
            output, _ = forward_step(
                forward_step_func,
                data_iterator[chunk],
                model[chunk],
                num_microbatches,
                given,
                store,
                config,
                cp_group_size=1,
                collect_non_loss_data=collect_non_loss_data,
                vp_stage=chunk,
                is_last_stage=stage == last,
            )
            if stage < last:
                wire.give(output, stage + 1)
            if not forward_only:
                passed[stage] = given, output
                if stage < last:
                    deallocate_output_tensor(output, config.deallocate_pipeline_outputs)
        for stage, (given, output) in sorted(passed.items(), reverse=True):
            gradient = wire.take(stage + 1).to(output.dtype) if stage < last else None
            back = backward_step(given, output, gradient, config)
            if stage:
                wire.give(back, stage - 1)
    if not forward_only:
        config.finalize_model_grads_func(model)
    return store


def finalize(model, *args, **kwargs):
    """core's, which knows copies of the embedding on other ranks only: here both are the first rank's."""
    copies = [
        chunk.embedding.word_embeddings.weight for chunk in map(bare, model) if hasattr(chunk, "embedding")
    ]
    if len(copies) > 1:
        total = sum(weight.main_grad for weight in copies)
        for weight in copies:
            weight.main_grad.copy_(total)
    finalize_model_grads(model, *args, **kwargs)
