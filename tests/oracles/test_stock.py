"""A model of plugins equals the model that megatron-core builds from its own specs, bit for bit in fp32."""

from __future__ import annotations

import copy

from built import tiny_model
from runs import SEQUENTIAL


def stock_model(plan, settings):
    """megatron-core's own decoder and MTP specs; only the core attention is ours, core has none for MLA."""
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_mtp_block_spec_for_backend,
    )
    from megatron.core.models.gpt.gpt_model import GPTModel

    from dsplugins.plugins.backend.sdpa import SdpaCoreAttention

    config = copy.copy(settings.model)
    config.moe_router_enable_expert_bias = True
    block = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    for layer in block.layer_specs:
        layer.submodules.self_attention.submodules.core_attention = SdpaCoreAttention
    mtp = get_gpt_mtp_block_spec_for_backend(config, block, LocalSpecProvider())
    return GPTModel(
        config=config,
        transformer_layer_spec=block,
        vocab_size=settings.vocab_size,
        max_sequence_length=plan.data.seq_length,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        mtp_block_spec=mtp,
    )


def said_by_heads(step, ours, stock, tokens, positions):
    """What differs in the logits of the model and of MTP, without touching counts or gradients."""
    import torch

    def logits(model):
        heard = []
        handle = model.output_layer.register_forward_hook(lambda *given: heard.append(given[-1][0].clone()))
        model.eval()
        with torch.no_grad():
            model(tokens[:, :-1], positions, None, labels=tokens[:, 1:])
        model.train()
        handle.remove()
        return heard

    mine, theirs = logits(ours), logits(stock)
    if len(mine) != 2 or not all(torch.equal(*pair) for pair in zip(mine, theirs, strict=True)):
        return [f"step {step}: logits of MTP and of the model, {len(mine)} and {len(theirs)}"]
    return []


def three_steps():
    """What differs between the two over three AdamW steps; empty if nothing does."""
    import torch
    from megatron.core.transformer.moe.moe_utils import get_updated_expert_bias

    from dsplugins import routers

    different = []
    with tiny_model(*SEQUENTIAL, "plugins.aux_free.sequence_loss=0.1") as (plan, settings, _, (ours,)):
        stock = stock_model(plan, settings)
        if set(ours.state_dict()) != set(stock.state_dict()):
            return [f"keys {set(ours.state_dict()) ^ set(stock.state_dict())}"]
        stock.load_state_dict(ours.state_dict())
        optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (ours, stock)]
        torch.manual_seed(0)
        for step in range(3):
            tokens = torch.randint(0, 260, (2, 33))
            positions = torch.arange(32).expand(2, -1)
            different += said_by_heads(step, ours, stock, tokens, positions)
            losses = [m(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).mean() for m in (ours, stock)]
            for loss, optimizer in zip(losses, optimizers, strict=True):
                optimizer.zero_grad()
                loss.backward()
            if not torch.equal(*losses):
                different.append(f"step {step}: loss {losses}")
            theirs = dict(stock.named_parameters())
            for name, parameter in ours.named_parameters():
                if not torch.equal(parameter.grad, theirs[name].grad):
                    different.append(f"step {step}: gradient of {name}")
            for optimizer in optimizers:
                optimizer.step()
            for (name, mine), (_, other) in zip(routers.local([ours]), routers.local([stock]), strict=True):
                counts = other.local_tokens_per_expert
                if not torch.equal(mine.local_tokens_per_expert, counts.float()):
                    different.append(f"step {step}: counts of {name}")
                other.expert_bias.copy_(get_updated_expert_bias(counts, other.expert_bias, 0.001))
                mine.update_bias(mine.local_tokens_per_expert)
                mine.local_tokens_per_expert.zero_()
                counts.zero_()
        for name, value in ours.state_dict().items():
            if isinstance(value, torch.Tensor) and not torch.equal(value, stock.state_dict()[name]):
                different.append(f"after three steps: {name}")
    return different


def test_same_as_stock_bit_for_bit(workers):
    assert workers(1).run(three_steps)[0] == []


def beside_a_loop_by_hand():
    """Names of what differs after three steps of a run and of a loop written with megatron-core alone."""
    from runs import assembled

    from dsplugins.bench import loop
    from dsplugins.model import bare

    def after(kind):
        with assembled(["train.learning_rate=1.0e-3"]) as run:
            for group in run.optimizer.param_groups:
                group["lr"] = 1e-3 * group.get("lr_mult", 1.0)  # a run writes it anew in each step
            step = kind(run)
            for _ in range(3):
                step()
            state = bare(run.chunks[0]).state_dict()
            return {name: value.clone() for name, value in state.items() if hasattr(value, "clone")}

    import torch

    ours, plain = after(loop._ours), after(loop._hand_written)
    assert ours.keys() == plain.keys()
    return [name for name in ours if not torch.equal(ours[name], plain[name])], len(ours)


def test_three_steps_are_those_of_a_loop_by_hand_with_core_s_optimizer(workers):
    """DDP, the distributed optimizer, clipping, the routers' biases: every weight and buffer, bit for bit."""
    ((different, count),) = workers(1).run(beside_a_loop_by_hand)
    assert different == [] and count > 50
