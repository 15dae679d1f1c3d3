"""AdamW as DeepSeek-V3 was trained with it: ZeRO-1, FP32 master weights, moments in FP32 or BF16."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dsplugins import apex
from dsplugins.contracts import Problem
from dsplugins.hookspecs import hookimpl
from dsplugins.plugins.optimizer import overlap

if TYPE_CHECKING:
    import torch
    from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig

    from dsplugins.contracts import Plan, Settings

BF16_STALL = 1 - 2**-8
"""From this decay rate on, a BF16 moment can stand still: the step it should shrink by, (1 - beta) of
itself, is no longer above half a unit in the last place, and rounding to nearest takes it back."""


@dataclass(frozen=True)
class AdamWOptions:
    """Options of AdamW. Betas, eps, weight decay and clipping are the recipe's `optimizer:` section."""

    moments: Literal["fp32", "bf16"] = "fp32"
    """What both moments are kept in between steps; V3 kept them in BF16 (arXiv 2412.19437, 3.3.3).
    The arithmetic of a step is FP32 either way."""
    no_decay: tuple[str, ...] = ("vectors",)
    """Parameters without weight decay: `vectors` are all of one dimension (norm gains, biases); any
    other entry is a shell pattern on the name within its model chunk, such as
    `*word_embeddings.weight` (layers count from 0 in each chunk). The paper doesn't say what V3
    excluded. A router's balancing bias is a buffer and never decays."""
    zero: bool = True
    """Each data-parallel rank keeps the moments and master weights of its share only (ZeRO-1, as V3
    did: section 3.2). False keeps them all on each rank."""
    fused: bool | None = None
    """Use torch's fused kernel, which goes through memory once instead of a dozen times; FP32 moments
    only. It rounds differently from the unfused one. Null: wherever moments are FP32, with torch's kernel."""
    kernel: Literal["torch", "apex"] = "torch"
    """Whose AdamW makes the step: torch's, or NVIDIA apex's, which takes all tensors at once, on GPUs and
    with FP32 moments. Checkpoints are the same with either."""
    overlap_grad_reduce: bool = False
    """Sum gradients over the data-parallel ranks while the last micro-batch's backward still runs: a bucket
    of `ddp.bucket_size` elements, with all experts of a layer or none, starts on its way as soon as its last
    gradient is there. Pays where a step waits for the reduction. No number changes but by the order of a
    sum: with `zero` and several buckets a rank's share is cut elsewhere, and the gradient norm is summed in
    another order."""
    overlap_param_gather: bool = False
    """Gather updated weights while the next forward runs, each bucket before the first module that needs it,
    instead of all of them after the update. Needs `zero` and `overlap_grad_reduce`."""


class AdamW:
    """AdamW through megatron-core's optimizer wrappers, with torch's arithmetic on every machine.

    megatron-core takes the Adam class of Transformer Engine or Apex where one is installed; here the
    class inside the wrapper is torch's `AdamW` (or `Bf16MomentsAdamW`) unless `kernel` says otherwise:
    what is installed never decides. Source: arXiv 2412.19437, sections 3.3.3 and 4.2;
    megatron/core/optimizer/__init__.py.
    """

    Options = AdamWOptions
    contract = ">=1.0,<2"
    requires: ClassVar[tuple[str, ...]] = ()
    conflicts: ClassVar[tuple[str, ...]] = ()
    env: ClassVar[Mapping[str, str]] = {}

    def __init__(self, options: AdamWOptions) -> None:
        self.options = options
        self.moments = {"fp32": "float32", "bf16": "bfloat16"}[options.moments]
        """Type of both moments, for the audit: loading a state may widen them without a word."""

    @hookimpl
    def ds_settings(self, plan: Plan) -> Mapping[str, object]:
        """Adam with decoupled decay, FP32 gradient sums, sharding and overlap as the options say."""
        return {
            "optimizer.optimizer": "adam",
            "optimizer.decoupled_weight_decay": True,
            "optimizer.use_distributed_optimizer": self.options.zero,
            "ddp.use_distributed_optimizer": self.options.zero,
            "ddp.grad_reduce_in_fp32": True,
            **overlap.fields(self.options, plan),
        }

    @hookimpl
    def ds_check(self, plan: Plan, settings: Settings) -> Iterable[Problem]:
        """Numbers that AdamW can't use, and wishes that exclude each other."""
        yield from _numbers(settings.optimizer)
        if "lr" in plan.optimizer:
            yield Problem(
                "optimizer.lr has no effect: the learning rate follows train.learning_rate",
                key="optimizer.lr",
                remedy="remove it and set train.learning_rate",
            )
        for field in ("optimizer_cpu_offload", "optimizer_cuda_graph", "use_precision_aware_optimizer"):
            if getattr(settings.optimizer, field, False):
                yield Problem(
                    f"optimizer.{field}=true needs an Adam class that plugin adamw doesn't use",
                    key=f"optimizer.{field}",
                    remedy="remove it; for BF16 moments set plugins.adamw.moments: bf16",
                )
        if self.options.kernel == "apex":
            yield from self._apex_problems(plan)
        else:
            yield from apex.unusable("plugins.adamw")
        if self.options.moments == "bf16":
            yield from self._bf16_problems(settings.optimizer)
        yield from overlap.problems(self.options, plan, settings)

    @hookimpl
    def ds_check_built(self, stages: Sequence[Sequence[torch.nn.Module]]) -> Iterable[Problem]:
        """Entries of `no_decay` that no parameter of the model is named like."""
        from dsplugins.plugins.optimizer.build import idle

        for entry in sorted(idle(self.options.no_decay, [chunk for chunks in stages for chunk in chunks])):
            yield Problem(
                f"plugins.adamw.no_decay: no parameter is named like {entry!r}",
                key="plugins.adamw.no_decay",
                remedy="a shell pattern on names such as decoder.layers.0.mlp.router.weight, or vectors",
            )

    def _apex_problems(self, plan: Plan) -> Iterable[Problem]:
        key = "plugins.adamw.kernel"
        yield from apex.chosen(key, plan, "amp_C")
        if self.options.moments == "bf16" or self.options.fused:
            other = "moments=bf16" if self.options.moments == "bf16" else "fused=true"
            yield Problem(f"{key}=apex has no {other}", key, "drop one of the two")

    def _bf16_problems(self, config: OptimizerConfig) -> Iterable[Problem]:
        if self.options.fused:
            yield Problem(
                "plugins.adamw.fused=true has no kernel for moments=bf16",
                key="plugins.adamw.fused",
                remedy="drop one of the two",
            )
        for field in ("adam_beta1", "adam_beta2"):
            if getattr(config, field) > BF16_STALL:
                yield Problem(
                    f"optimizer.{field}={getattr(config, field)} is too slow for BF16 moments: rounding to "
                    "nearest would freeze them",
                    key=f"optimizer.{field}",
                    remedy=f"at most {BF16_STALL} (V3: 0.9 and 0.95), or plugins.adamw.moments: fp32",
                )

    @hookimpl
    def ds_optimizer(self, config: OptimizerConfig, chunks: Sequence[torch.nn.Module]) -> MegatronOptimizer:
        """See `build.build_optimizer`."""
        from dsplugins.plugins.optimizer.build import build_optimizer

        return build_optimizer(
            config,
            chunks,
            moments=self.options.moments,
            no_decay=self.options.no_decay,
            fused=self._fused(),
            kernel=self.options.kernel,
        )

    def _fused(self) -> bool:
        """Whether torch's fused kernel makes the step."""
        if self.options.fused is None:
            return self.options.moments == "fp32" and self.options.kernel == "torch"
        return self.options.fused


def _numbers(config: Any) -> Iterable[Problem]:
    """Ranges of AdamW's own numbers."""
    for field in ("adam_beta1", "adam_beta2"):
        if not 0.0 <= getattr(config, field) < 1.0:
            yield Problem(
                f"optimizer.{field}={getattr(config, field)} is outside [0, 1)",
                key=f"optimizer.{field}",
                remedy="V3: adam_beta1 0.9, adam_beta2 0.95",
            )
    if not config.adam_eps > 0.0:
        yield Problem(
            f"optimizer.adam_eps={config.adam_eps} is not above 0",
            key="optimizer.adam_eps",
            remedy="try 1e-8",
        )
    for field, remedy in (("weight_decay", "V3: 0.1"), ("clip_grad", "V3: 1.0; 0 turns clipping off")):
        if getattr(config, field) < 0.0:
            yield Problem(
                f"optimizer.{field}={getattr(config, field)} is below 0",
                key=f"optimizer.{field}",
                remedy=remedy,
            )
