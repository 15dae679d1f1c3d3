"""Training steps of the same shapes: ours from a recipe, and transformers' DeepseekV3ForCausalLM.

`python -m dsplugins.bench.contestants KIND RECIPE THREADS` takes as many steps as each line of its input
says and answers with the seconds a step: one process a contestant, since a process that megatron-core runs
in without a GPU has its `torch.cuda` redirected.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

KINDS = ("dsplugins", "huggingface")


def our_step(recipe: str) -> Callable[[], object]:
    """A step of the recipe in this process, as a run takes it."""
    from dsplugins import process_group
    from dsplugins.plan import prepare
    from dsplugins.recipe import Recipe

    loaded = Recipe.load(Path(recipe))
    plugins, plan = prepare(loaded)
    platform, device = process_group.stand(plan, plugins)
    from dsplugins.assemble import assemble
    from dsplugins.step import Progress, take_step

    run, progress = assemble(loaded, plan, plugins, platform, device), Progress()

    def step() -> object:
        nonlocal progress
        taken = take_step(run, progress)
        progress = progress.after(taken)
        return taken.loss

    return step


def their_step(recipe: str) -> Callable[[], object]:
    """A step of transformers' model: bf16 weights, torch's AdamW on them, clipping; no MTP, no balancing."""
    import torch
    from torch.nn import functional
    from transformers import DeepseekV3ForCausalLM

    from dsplugins.plan import prepare
    from dsplugins.recipe import Recipe

    plugins, plan = prepare(Recipe.load(Path(recipe)))
    data = plugins.slot("data", plan=plan)
    torch.manual_seed(plan.train.seed)
    model: Any = DeepseekV3ForCausalLM(_their_config(plan.model))
    model.to(torch.bfloat16).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
    size, first = plan.train.micro_batch, 0

    def step() -> object:
        nonlocal first
        rows = torch.stack([data.train(first + i) for i in range(size)])
        logits = model(rows[:, :-1]).logits
        loss = functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        first += size
        return loss.item()

    return step


def _their_config(model: Mapping[str, Any]) -> Any:
    from transformers import DeepseekV3Config

    return DeepseekV3Config(
        vocab_size=model["vocab_size"],
        hidden_size=model["hidden_size"],
        intermediate_size=model["ffn_hidden_size"],
        moe_intermediate_size=model["moe_ffn_hidden_size"],
        num_hidden_layers=model["num_layers"],
        first_k_dense_replace=1,
        num_attention_heads=model["num_attention_heads"],
        num_key_value_heads=model["num_attention_heads"],
        n_routed_experts=model["num_moe_experts"],
        num_experts_per_tok=model["moe_router_topk"],
        n_group=model["moe_router_num_groups"],
        topk_group=model["moe_router_group_topk"],
        n_shared_experts=1,
        q_lora_rank=model["q_lora_rank"],
        kv_lora_rank=model["kv_lora_rank"],
        qk_nope_head_dim=model["qk_head_dim"],
        qk_rope_head_dim=model["qk_pos_emb_head_dim"],
        v_head_dim=model["v_head_dim"],
        routed_scaling_factor=model["moe_router_topk_scaling_factor"],
        rope_parameters={"rope_theta": float(model["rotary_base"]), "rope_type": "default"},
        use_cache=False,
    )


def main(kind: str, recipe: str, threads: str) -> None:
    """Answer step counts on standard input with seconds a step on standard output."""
    os.environ |= {"OMP_NUM_THREADS": threads, "TORCHDYNAMO_DISABLE": "1"}
    import torch

    from dsplugins.quiet import quiet

    quiet()
    torch.set_num_threads(int(threads))
    step = our_step(recipe) if kind == "dsplugins" else their_step(recipe)
    torch.set_num_threads(int(threads))
    for line in sys.stdin:
        began = time.perf_counter()
        for _ in range(int(line)):
            loss = step()
        print(json.dumps({"seconds": (time.perf_counter() - began) / int(line), "loss": loss}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
