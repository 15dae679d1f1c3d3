"""The 671B recipe made small by overrides alone, and what it makes, in values that can be compared.

The functions without underscore run inside a resident worker, each a little further into a run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

RECIPE = "deepseek_v3/v3_671b.yaml"
SIZES = (
    "model={vocab_size: 264, num_layers: 3, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 2,"
    " q_lora_rank: 16, kv_lora_rank: 16, qk_head_dim: 8, qk_pos_emb_head_dim: 4, v_head_dim: 8,"
    " num_moe_experts: 16, moe_ffn_hidden_size: 16, moe_shared_expert_intermediate_size: 16,"
    " moe_router_topk: 4, moe_router_num_groups: 4, moe_router_group_topk: 2}",
    "plugins.gpt.dense_layers=1",
    "data.seq_length=16",
    "evaluate.sequences=8",
    f"plugins.python_source.directory={sysconfig.get_path('stdlib')}/wsgiref",  # small, and never changes
)
PLATFORM = "plugins={cuda: null, cpu: {}, te: null, torch_local: {}}"
SHRUNK = (
    *SIZES,
    PLATFORM,
    "plugins={aux_free: {update_rate: 0.001}, mtp: {weight: 0.3}, expert_load: {every: 1}}",
    "train={tokens: 128, global_batch: 4, learning_rate: 1.0e-3}",
    "evaluate.every=1",
    "save.at_end=false",
    "model.pipeline_model_parallel_layout=EtttmL",
    "parallel={pipeline: 1, expert: 1}",
    "run.world_size=1",
)
"""One process, three layers and MTP, two steps."""
ECHOES = {
    *("learning_rate", "bias_update_rate", "mtp_weight", "global_batch", "tokens"),
    *("time", "tokens_per_second", "step_seconds"),
}
"""Fields of `metrics.jsonl` that repeat the recipe, or tell the time: what changes only these is dead."""


def built(overrides: Sequence[str], recipe: str = RECIPE) -> dict[str, Any]:
    """What stands on this rank before the first step, and what it reads first; or the keys refused."""
    from dsplugins.contracts import RecipeError

    try:
        with _assembled(recipe, overrides) as run:
            return {
                "shapes": {name: (tuple(p.shape), str(p.dtype)) for name, p in _parameters(run)},
                "weights": _digest(p for _, p in _parameters(run)),
                "modules": _modules(run),
                "optimizer": _optimizer(run),
                "samples": _digest(_first_micro_batches(run)),
            }
    except RecipeError as error:
        return {"refused": [problem.key for problem in error.problems]}


def kept(overrides: Sequence[str], recipe: str = RECIPE) -> dict[str, Any]:
    """Bytes that one micro-batch's forward pass keeps for backward."""
    import torch

    storages: dict[int, Any] = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
        return tensor

    with _assembled(recipe, overrides) as run:
        tokens, labels, positions = _first_micro_batches(run)[:3]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = run.chunks[0](tokens, positions, None, labels=labels)
        kept = sum(storage.nbytes() for storage in storages.values())
        loss.sum().backward()  # what recomputation keeps would never go, and hold the model
        return {"kept bytes": kept}


def stepped(overrides: Sequence[str], recipe: str = RECIPE) -> dict[str, Any]:
    """Numbers of each step, and what is trained in the end: master weights and routers' biases."""
    from dsplugins.step import Progress, take_step

    with _assembled(recipe, overrides) as run:
        steps, progress = [], Progress()
        while not steps or steps[-1].tokens < run.plan.train.tokens:
            steps.append(take_step(run, progress))
            progress = progress.after(steps[-1])
        masters = [p for group in run.optimizer.param_groups for p in group["params"]]
        buffers = [b for chunk in run.chunks for _, b in chunk.named_buffers()]
        return {
            "losses": [(s.loss, s.mtp_loss, s.aux_loss, s.grad_norm) for s in steps],
            "counts": [s.expert_counts.tolist() for s in steps],
            "trained": _digest([*masters, *buffers]),
        }


def ran(overrides: Sequence[str], recipe: str = RECIPE) -> dict[str, Any]:
    """What the command leaves in the folder where it is called: rows of metrics, evaluations, files."""
    from dsplugins import train
    from dsplugins.recipe import Recipe
    from dsplugins.show import Display

    evaluations: list[tuple[Any, ...]] = []

    def note(display: Display, found: Any, baselines: Any, asked: int) -> None:
        evaluations.append((found.step, found.loss, found.sequences))

    with (
        _world(),
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),
        mock.patch.object(Display, "evaluation", note),
        mock.patch("torch.distributed.destroy_process_group"),  # it is the worker's, and goes on
    ):
        train.train(Recipe.load(recipe, overrides))
        files = sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())
        (metrics,) = Path(folder).rglob("metrics.jsonl")
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return {
        "metrics": [{name: row[name] for name in row if name not in ECHOES} for row in rows],
        "evaluations": evaluations,
        "files": files,
    }


@contextlib.contextmanager
def _world() -> Iterator[None]:
    """This worker's world as torchrun would describe it."""
    import torch

    from dsplugins.testing import temporary_groups

    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    described = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    with mock.patch.dict(os.environ, described), temporary_groups():
        yield


@contextlib.contextmanager
def _assembled(recipe: str, overrides: Sequence[str]) -> Iterator[Any]:
    from dsplugins.assemble import assemble
    from dsplugins.plan import prepare
    from dsplugins.recipe import Recipe

    loaded = Recipe.load(recipe, overrides)
    plugins, plan = prepare(loaded)
    with _world():
        platform = plugins.slot("platform", plan=plan)
        yield assemble(loaded, plan, plugins, platform, platform.prepare(0))


def _parameters(run: Any) -> list[tuple[str, Any]]:
    return [(f"{i}.{name}", p) for i, chunk in enumerate(run.chunks) for name, p in chunk.named_parameters()]


def _modules(run: Any) -> list[tuple[str, str]]:
    """Every module's class; dispatchers, too, which are none."""
    named = [pair for chunk in run.chunks for pair in chunk.named_modules()]
    named += [(f"{n}.dispatcher", m.token_dispatcher) for n, m in named if hasattr(m, "token_dispatcher")]
    return [(name, type(module).__qualname__) for name, module in named]


def _optimizer(run: Any) -> list[Any]:
    """Classes of wrapper and optimizer, the type of their moments, and which shapes decay by how much."""
    parts = getattr(run.optimizer, "chained_optimizers", [run.optimizer])
    found: list[Any] = []
    for part in parts:
        inner = part.optimizer
        moments = {str(state["exp_avg"].dtype) for state in inner.state.values()}
        found.append((type(part).__name__, type(inner).__name__, sorted(moments)))
        found += [(g["weight_decay"], sum(p.numel() for p in g["params"])) for g in inner.param_groups]
    return found


def _first_micro_batches(run: Any) -> list[Any]:
    """Tokens, labels and positions of this rank's first four micro-batches."""
    from megatron.core import parallel_state

    from dsplugins.batches import micro_batches

    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    size = run.plan.train.micro_batch
    batches = micro_batches(run.data.train, 0, 4, size, rank, ranks, run.device)
    return [tensor for batch in batches for tensor in batch]


def _digest(tensors: Iterable[Any]) -> str:
    import torch

    total = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().contiguous().reshape(-1)
        total.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        total.update(flat.view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
