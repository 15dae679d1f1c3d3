"""The activation memory policy of DeepSeek-V3."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsplugins.contracts import Plan, Problem, Settings
from dsplugins.hookspecs import hookimpl
from dsplugins.plugins.recompute.extension import left_over
from dsplugins.words import size

if TYPE_CHECKING:
    import torch
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    from dsplugins.plugins.recompute.outputs import Report


@dataclass(frozen=True)
class V3RecomputeOptions:
    """Options of v3_recompute."""

    mla_up_proj: bool = True
    """Make queries, keys and values again from their latents in backward; needs latent attention."""
    norms: bool = True
    """Make the output of every RMSNorm again in backward: layers, latents, final norm and MTP."""


class V3Recompute:
    """Recomputation of RMSNorm and MLA up-projection (arXiv 2412.19437, section 3.2.3).

    The up-projection is megatron-core's `recompute_modules: [mla_up_proj]`, which compiles a small C++
    extension when it is first used. Core's `layernorm` there covers two norms of a layer and needs
    TransformerEngine; here all of them are covered, with any backend (see `outputs.Outputs`). Losses and
    gradients keep every bit. The chunk gets an attribute `ds_recompute_report` (`outputs.Report`) with
    the measured bytes that the norms no longer hold; a run tells them at its end. Linears of `fp8_v3` that
    read such an output keep no codes of it, either: they cast it again (`numerics.remade`).
    """

    Options = V3RecomputeOptions
    contract = ">=1.0,<2"

    def __init__(self, options: V3RecomputeOptions) -> None:
        self.options = options
        self._reports: list[Report] = []

    @hookimpl
    def ds_settings(self, plan: Plan) -> Mapping[str, object]:
        """Core's recomputation of the up-projection."""
        if not self.options.mla_up_proj:
            return {}
        return {"model.recompute_granularity": "selective", "model.recompute_modules": ["mla_up_proj"]}

    @hookimpl
    def ds_check(self, plan: Plan, settings: Settings) -> Iterable[Problem]:
        """What the two parts need, and what would bypass them."""
        config = settings.model
        if self.options.mla_up_proj and not config.multi_latent_attention:
            yield Problem(
                "plugins.v3_recompute.mla_up_proj needs latent attention",
                key="plugins.v3_recompute.mla_up_proj",
                remedy="plugins.v3_recompute.mla_up_proj: false",
            )
        if self.options.mla_up_proj:
            yield from _build_problems()
        if self.options.norms:
            yield from _norm_problems(config)

    @hookimpl
    def ds_recompute(self, config: MLATransformerConfig, chunk: torch.nn.Module) -> bool:
        """Attach the hooks and the report."""
        from dsplugins.plugins.recompute.outputs import Outputs

        outputs = Outputs()
        if self.options.norms:
            outputs.attach(chunk)
        setattr(chunk, "ds_recompute_report", outputs.report)  # noqa: B010  (Module's own type has no such field)
        self._reports.append(outputs.report)
        return True

    @hookimpl
    def ds_run_end(self) -> Mapping[str, str]:
        """How much the norms of rank 0 no longer held."""
        norms, saved = (sum(getattr(r, name) for r in self._reports) for name in ("norms", "avoided_bytes"))
        if not saved:
            return {}
        return {
            "saved": f"{size(saved)} of activations a micro-batch on rank 0, the outputs of {norms} norms"
        }


def _build_problems() -> Iterable[Problem]:
    """What would keep megatron-core from compiling its extension."""
    key, otherwise = "plugins.v3_recompute.mla_up_proj", "plugins.v3_recompute.mla_up_proj: false"
    missing = [tool for tool in ("ninja", "c++") if shutil.which(tool) is None]
    if missing:
        said = f"megatron-core compiles an extension for mla_up_proj, without {' and '.join(missing)} here"
        yield Problem(said, key, f"install them, or {otherwise}", kind="environment")
    if lock := left_over():
        said = f"a killed build of megatron-core's extension for mla_up_proj left {lock}: torch waits for it"
        yield Problem(said, key, f"rm {lock}", kind="environment")


def _norm_problems(config: MLATransformerConfig) -> Iterable[Problem]:
    """Features of megatron-core that would skip the hooks, or empty the same tensors."""
    recomputed = config.recompute_modules or []
    clashes = {
        "recompute_granularity": config.recompute_granularity == "full",
        "recompute_modules": config.recompute_granularity == "selective" and "layernorm" in recomputed,
        "cuda_graph_impl": config.cuda_graph_impl != "none",
        "cpu_offloading": config.cpu_offloading,
        "fine_grained_activation_offloading": config.fine_grained_activation_offloading,
        "overlap_moe_expert_parallel_comm": config.overlap_moe_expert_parallel_comm,
    }
    for name, clash in clashes.items():
        if clash:
            yield Problem(
                f"plugins.v3_recompute.norms doesn't work with model.{name}={getattr(config, name)}",
                key=f"model.{name}",
                remedy=f"plugins.v3_recompute.norms: false, or leave model.{name} out",
            )
