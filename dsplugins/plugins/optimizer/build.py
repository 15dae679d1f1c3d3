"""megatron-core's optimizer wrappers around an Adam class that we choose."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from megatron.core.optimizer import (
    ChainedOptimizer,
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate

from dsplugins.optimizer_groups import leaves
from dsplugins.plugins.optimizer.bf16_moments import Bf16MomentsAdamW
from dsplugins.plugins.optimizer.plain_chain import PlainChain
from dsplugins.plugins.optimizer.steps import keep_steps


def build_optimizer(
    config: OptimizerConfig,
    chunks: Sequence[torch.nn.Module],
    *,
    moments: Literal["fp32", "bf16"] = "fp32",
    no_decay: Sequence[str] = ("vectors",),
    fused: bool = False,
    kernel: Literal["torch", "apex"] = "torch",
) -> MegatronOptimizer:
    """The optimizer over DDP-wrapped `chunks`; collective over all ranks.

    Moments are allocated (as zeros) at once, so that lack of memory shows before the first step and
    a fresh optimizer can be saved. Learning rates are 0 until the loop writes them. `wd_mult` of a
    group is folded into its `weight_decay`: megatron-core leaves that to its own LR scheduler.

    Raises `ValueError` for settings that contradict each other or a pattern that fits no parameter.
    """
    _refuse_contradictions(config, chunks, moments, fused)
    _refuse_idle_patterns(no_decay, chunks)
    limit, config = config.clip_grad, copy.copy(config)
    config.lr, config.min_lr = 0.0, None
    config.clip_grad = 0.0  # PlainChain clips
    built = get_megatron_optimizer(
        config,
        list(chunks),
        config_overrides=_without_decay(no_decay),
        use_gloo_process_groups=_gloo_groups_exist(),
    )
    assert type(built) is ChainedOptimizer, (
        f"core 0.19 makes a chain of optimizers, not {type(built).__name__}"
    )
    device = next(chunks[0].parameters()).device
    optimizer = PlainChain(built.chained_optimizers, limit, device, chunks)
    parts = list(leaves(optimizer))
    for part in parts:
        _choose_class(part, config, moments, fused, kernel)
    _gather_once(parts)
    return optimizer


def _gather_once(parts: Sequence[MegatronOptimizer]) -> None:
    """Leave the gathering of updated weights to the last of chained optimizers.

    With ZeRO core has one optimizer for the experts and one for the rest. Each gathers all weights of its
    chunks after its own update (distrib_optimizer.py, `start_param_sync_for_bucket_group_subset`): twice the
    bytes, and the first time with half of the weights still old. Core's flag to put it off is for MXFP8.
    """
    for part in parts[:-1]:
        if isinstance(part, DistributedOptimizer) and part.model_chunks == parts[-1].model_chunks:
            part._defer_param_sync = True


def decays(no_decay: Sequence[str], parameter: torch.Tensor, name: str) -> bool:
    """False for parameters that an entry of `no_decay` fits; `name` may carry wrappers' prefixes."""
    return not any(_fits(entry, parameter, name) for entry in no_decay)


def _fits(entry: str, parameter: torch.Tensor, name: str) -> bool:
    if entry == "vectors":
        return parameter.ndim <= 1
    while name.startswith("module."):  # DDP's and Float16Module's
        name = name.removeprefix("module.")
    return fnmatch.fnmatchcase(name, entry)


def _without_decay(no_decay: Sequence[str]) -> Mapping[Any, Mapping[str, float]]:
    """megatron-core's per-parameter overrides that take weight decay off."""

    def fits(parameter: torch.Tensor, name: str) -> bool:
        return not decays(no_decay, parameter, name)

    key = ParamKey(with_name_predicate=ParamWithNamePredicate(name="no_decay", fn=fits))
    return {key: {"wd_mult": 0.0}}


def _refuse_contradictions(
    config: OptimizerConfig, chunks: Sequence[torch.nn.Module], moments: str, fused: bool
) -> None:
    if config.optimizer != "adam" or not config.decoupled_weight_decay:
        raise ValueError("plugin adamw needs optimizer.optimizer=adam and decoupled_weight_decay=true")
    for field in ("optimizer_cpu_offload", "optimizer_cuda_graph", "use_precision_aware_optimizer"):
        if getattr(config, field):
            raise ValueError(f"plugin adamw can't be used with optimizer.{field}: remove it")
    if fused and moments == "bf16":
        raise ValueError("plugins.adamw.fused=true has no kernel for moments=bf16: drop one of the two")
    for chunk in chunks:
        wrapping: Any = chunk.ddp_config
        if wrapping.use_distributed_optimizer != config.use_distributed_optimizer:
            raise ValueError(
                "optimizer.use_distributed_optimizer and ddp.use_distributed_optimizer differ: "
                "set plugins.adamw.zero instead of either"
            )
        if not config.bf16 and any(p.dtype == torch.bfloat16 for p in chunk.parameters()):
            raise ValueError("the model holds BF16 parameters, but optimizer.bf16 is false: set it to true")


def _refuse_idle_patterns(no_decay: Sequence[str], chunks: Sequence[torch.nn.Module]) -> None:
    """A pattern that fits nothing on any rank is a typing error."""
    everywhere: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, idle(no_decay, chunks))
    if unused := set.intersection(*everywhere):
        raise ValueError(f"plugins.adamw.no_decay: no parameter is named like {sorted(unused)}")


def idle(no_decay: Sequence[str], chunks: Iterable[torch.nn.Module]) -> set[str]:
    """Entries of `no_decay` that fit no parameter of `chunks`; `vectors` may fit none."""
    named = [item for chunk in chunks for item in chunk.named_parameters()]
    used = {entry for entry in no_decay if any(_fits(entry, p, name) for name, p in named)}
    return set(no_decay) - used - {"vectors"}


def _gloo_groups_exist() -> bool:
    """Whether the process groups that megatron-core gathers optimizer state over were made."""
    from megatron.core import parallel_state

    try:
        parallel_state.get_data_parallel_group_gloo(with_context_parallel=True)
        parallel_state.get_expert_data_parallel_group_gloo()
    except AssertionError:
        return False
    return True


def _choose_class(
    part: MegatronOptimizer, config: OptimizerConfig, moments: str, fused: bool, kernel: str
) -> None:
    """Put our Adam in the place of the one that megatron-core picked from what is installed."""
    picked = part.optimizer.param_groups
    settings = {
        "lr": config.lr,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_eps,
        "weight_decay": config.weight_decay,
    }
    # Made with empty groups first: FP32 shards are views, which torch's constructor would refuse.
    empty = [{**group, "params": []} for group in picked]
    inner: torch.optim.Optimizer
    if moments == "bf16":
        inner = Bf16MomentsAdamW(empty, **settings)
    elif kernel == "apex":
        from dsplugins.plugins.optimizer.apex_adamw import ApexAdamW

        inner = ApexAdamW(empty, **settings)
    else:
        inner = torch.optim.AdamW(empty, **settings, fused=fused)
    for ours, theirs in zip(inner.param_groups, picked, strict=True):
        ours["params"] = theirs["params"]
        ours["weight_decay"] = config.weight_decay * theirs["wd_mult"]
        ours["fused"] = fused
    dtype = torch.bfloat16 if moments == "bf16" else None
    _allocate(inner, dtype)
    keep_steps(inner)
    part.optimizer = inner
    part.init_state_fn = _init_state(dtype)


def _allocate(inner: torch.optim.Optimizer, dtype: torch.dtype | None) -> None:
    """Zero moments (of the parameter's own type if `dtype` is None) and step 0 where there are none."""
    for group in inner.param_groups:
        for param in group["params"]:
            if not inner.state[param]:
                inner.state[param].update(
                    # torch's fused kernel wants the counter on the device, the others on the host
                    step=torch.zeros((), device=param.device if group["fused"] else "cpu"),
                    exp_avg=torch.zeros_like(param, dtype=dtype),
                    exp_avg_sq=torch.zeros_like(param, dtype=dtype),
                )


def _init_state(dtype: torch.dtype | None) -> Callable[..., None]:
    """What megatron-core calls before loading; signature of its own `init_state_fn`."""

    def init(inner: torch.optim.Optimizer, config: OptimizerConfig | None = None) -> None:
        _allocate(inner, dtype)

    return init
