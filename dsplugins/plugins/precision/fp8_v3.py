"""FP8 as DeepSeek-V3 trained with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from dsplugins.contracts import Problem
from dsplugins.hookspecs import hookimpl

if TYPE_CHECKING:
    import torch
    from megatron.core.models.backends import BackendSpecProvider
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    from dsplugins.contracts import Plan, Settings


@dataclass(frozen=True)
class Fp8V3Options:
    """Options of fp8_v3."""

    backend: Literal["reference", "torch", "deepgemm"] = "reference"
    """What quantises and multiplies. `reference`: plain torch, the exact meaning, on CPU and CUDA. On Hopper,
    with casts in Triton: `torch`, cuBLAS by `torch.nn.functional.scaled_mm`; `deepgemm`, DeepGEMM's kernels,
    experts grouped. Never changed on the way: a machine that lacks what was named is refused."""
    products: tuple[Literal["fprop", "dgrad", "wgrad"], ...] = ("fprop", "dgrad", "wgrad")
    """Which products take FP8 operands: outputs, gradients of inputs, gradients of weights. The others take
    theirs as they come (inputs as they are kept for backward), to find out which rounding costs what; with
    the backend `reference` only."""
    scales: Literal["report", "power_of_two"] = "report"
    """`report`: powers of two in the three places of section 3.3.3, FP32 elsewhere; `power_of_two`:
    everywhere, as DeepSeek-V3.1."""
    keep_weights: bool = False
    """Cast each weight once a step, in either direction, and not in each micro-batch. Two bytes more for each
    weight; the same numbers."""
    outside: Literal["bf16", "fp32"] = "bf16"
    """Format of weights, activations and messages outside of the products: the report's, or `fp32`, in which
    layouts can be compared to the last digits. The products are the same."""


class Fp8V3:
    """E4M3 operands for all three products of each linear (arXiv 2412.19437, section 3.3).

    Activations and their gradients have a scale for each 1 x 128 tile, weights for each 128 x 128 block;
    weight gradients come from tiles along the tokens, and are summed in FP32. Covers the projections of
    attention, dense MLPs, shared and routed experts and the block of MTP. Embedding, head, gate, norms, core
    attention and MTP's `eh_proj` keep BF16 or FP32. For backward, linears keep their input in E4M3, the one
    after attention in E5M6, and MLPs keep the input of SwiGLU and make its output again.
    """

    Options = Fp8V3Options
    contract = ">=1.3,<2"

    def __init__(self, options: Fp8V3Options) -> None:
        self.options = options
        self.told = f"backend {options.backend}"

    @hookimpl
    def ds_settings(self, plan: Plan) -> Mapping[str, object]:
        """The format outside of the products. Core's own `fp8` stays unset: it is TransformerEngine's."""
        half = self.options.outside == "bf16"
        return {
            "model.bf16": half,
            "model.fp16": False,
            "model.fp8": None,
            "model.fp4": None,
            "optimizer.bf16": half,
            "optimizer.fp16": False,
            "ddp.grad_reduce_in_fp32": True,
        }

    @hookimpl
    def ds_check(self, plan: Plan, settings: Settings) -> Iterable[Problem]:
        """MLPs that aren't SwiGLU, weight gradients that would not wait; what the backend lacks, of the
        recipe or of this machine."""
        from dsplugins.plugins.precision.fp8 import needs

        if not self.options.products or len(set(self.options.products)) < len(self.options.products):
            said = "plugins.fp8_v3.products names no product, or one twice"
            yield Problem(said, "plugins.fp8_v3.products", "some of fprop, dgrad, wgrad; or leave it out")
        yield from _not_swiglu(settings.model)
        if settings.model.delay_wgrad_compute:
            key, backend = "model.delay_wgrad_compute", plan.slots["backend"]
            said = f"fp8_v3's linears, in the place of {backend}'s, would not delay theirs"
            yield Problem(f"{key}=True: {said}", key, "leave it out")
        if self.options.backend != "reference":
            yield from needs.of_recipe(self.options, plan, settings)
        yield from self.lacks()

    def lacks(self) -> Iterable[Problem]:
        """What this machine lacks for the backend."""
        from dsplugins.plugins.precision.fp8 import needs

        return () if self.options.backend == "reference" else needs.of_machine(self.options.backend)

    def measures(self) -> Mapping[str, Callable[..., Mapping[str, Any]]]:
        """What `dsplugins experiment gpu` asks of the backend: its products, its casts."""
        from functools import partial

        from dsplugins.plugins.precision.fp8 import measure
        from dsplugins.plugins.precision.fp8.backends import arithmetic

        mine = arithmetic(self.options.backend)
        return {
            "products": partial(measure.products, mine),
            "casts": partial(measure.casts, mine),
        }

    @hookimpl
    def ds_precision(self, config: MLATransformerConfig, backend: BackendSpecProvider) -> BackendSpecProvider:
        """The backend with FP8 linears and MLPs."""
        from dsplugins.plugins.precision.fp8.provider import Fp8Provider
        from dsplugins.plugins.precision.fp8.rule import Choice

        options = self.options
        choice = Choice(options.backend, options.scales, options.products, options.keep_weights)
        return Fp8Provider(backend, choice)

    @hookimpl
    def ds_grads_ready(self, chunks: Sequence[torch.nn.Module]) -> None:
        """Let codes of weights go before the optimizer changes those."""
        if self.options.keep_weights:
            from dsplugins.plugins.precision.fp8 import weight_codes

            weight_codes.forget(chunks)


def _not_swiglu(config: MLATransformerConfig) -> Iterable[Problem]:
    import torch

    if not config.gated_linear_unit or config.activation_func is not torch.nn.functional.silu:
        said = "fp8_v3's MLPs are SwiGLU, whose input they keep in FP8"
        yield Problem(said, "plugins.fp8_v3", "model.gated_linear_unit: true, model.activation_func: silu")
    for field, neutral in (("activation_func_clamp_value", None), ("glu_linear_offset", 0.0)):
        if getattr(config, field) != neutral:
            said = f"model.{field}={getattr(config, field)} would not reach fp8_v3's MLPs"
            yield Problem(said, f"model.{field}", "leave it out")
    for field in (
        *("use_te_activation_func", "activation_func_fp8_input_store", "add_bias_linear"),
        "cpu_offloading",
    ):
        if getattr(config, field):
            said = f"model.{field}=True would not reach fp8_v3's MLPs, which keep SwiGLU's input in FP8"
            yield Problem(said, f"model.{field}", "leave it out")
