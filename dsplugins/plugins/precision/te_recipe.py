"""What TransformerEngine's FP8 recipes have in common as plugins: fields of megatron-core, and needs."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar

from dsplugins.contracts import Problem
from dsplugins.hookspecs import hookimpl
from dsplugins.plugins.precision.widths import uneven

if TYPE_CHECKING:
    from megatron.core.models.backends import BackendSpecProvider
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    from dsplugins.contracts import Plan, Settings

Version = tuple[int, ...]


class TeRecipe:
    """Megatron's own FP8, which TransformerEngine's linears multiply in; BF16 around them.

    Weights stay in BF16 and are cast at each use: optimizer and checkpoints are those of `bf16`. Core wraps
    each layer in TransformerEngine's autocast, and pads the tokens of each expert to what its kernels take.
    """

    name: ClassVar[str]
    """Of the plugin."""
    recipe: ClassVar[str]
    """`fp8_recipe` of megatron-core."""
    oldest: ClassVar[Version]
    """TransformerEngine that has the recipe."""
    multiple: ClassVar[int]
    """Of each width of a matrix, and of the tokens that a linear sees (core: `get_fp8_align_size`)."""
    contract = ">=1.3,<2"
    requires: ClassVar[tuple[str, ...]] = ("te",)
    conflicts: ClassVar[tuple[str, ...]] = ("grouped",)
    """Packed experts multiply by torch, and would stay in BF16; `sequential` ones have linears."""
    stand_in: ClassVar[str] = "bf16"
    """For `check`: core refuses `fp8` with experts where TransformerEngine is missing."""

    @hookimpl
    def ds_settings(self, plan: Plan) -> Mapping[str, object]:
        """E4M3 for all operands, as V3; weights and messages as `bf16` has them."""
        return {
            "model.bf16": True,
            "model.fp16": False,
            "model.fp8": "e4m3",
            "model.fp8_recipe": self.recipe,
            "model.fp8_param": False,
            "model.fp8_wgrad": True,
            "optimizer.bf16": True,
            "optimizer.fp16": False,
            "ddp.grad_reduce_in_fp32": True,
        }

    @hookimpl
    def ds_check(self, plan: Plan, settings: Settings) -> Iterable[Problem]:
        """Sizes that the kernels don't take, an older TransformerEngine, another GPU."""
        key = f"plugins.{self.name}"
        for said in uneven(settings.model, plan, self.multiple):
            yield Problem(
                f"{key} takes widths of multiples of {self.multiple}, but {said}", key, "another size"
            )
        tokens = self._tokens(plan, settings.model)
        if tokens % self.multiple:
            said = f"{key} takes multiples of {self.multiple} tokens, but a rank's micro-batch has {tokens}"
            yield Problem(said, key, "another data.seq_length or train.micro_batch")
        yield from self._library(key)
        yield from self._device(key)

    @hookimpl
    def ds_precision(self, config: MLATransformerConfig, backend: BackendSpecProvider) -> BackendSpecProvider:
        """The backend itself: its linears follow the autocast that core puts around them."""
        return backend

    def _tokens(self, plan: Plan, config: MLATransformerConfig) -> int:
        shared = plan.layout.context * (plan.layout.tensor if config.sequence_parallel else 1)
        return plan.data.seq_length * plan.train.micro_batch // shared

    def _library(self, key: str) -> Iterable[Problem]:
        """An older TransformerEngine; that it is missing is said by `te`."""
        try:
            version = importlib.metadata.version("transformer_engine")
        except importlib.metadata.PackageNotFoundError:
            return
        oldest = self.oldest_on(_capability())
        if _numbers(version) < oldest:
            wanted = ".".join(map(str, oldest))
            said = f"{key} needs TransformerEngine {wanted} or newer, installed is {version}"
            yield Problem(said, key, f"pip install 'transformer_engine>={wanted}'", kind="environment")

    def _device(self, key: str) -> Iterable[Problem]:
        """A GPU whose tensor cores don't have the format."""
        import torch

        if (found := _capability()) is None:
            return  # the platform says so
        for said in self.unfit(found, torch.version.cuda):
            yield Problem(f"{key} {said}", key, "name another precision plugin", kind="environment")

    def oldest_on(self, capability: tuple[int, int] | None) -> Version:
        """TransformerEngine that has the recipe on a GPU of this compute capability; None: on any."""
        return self.oldest

    def unfit(self, capability: tuple[int, int], cuda: str | None) -> Iterable[str]:
        """What keeps the recipe from a GPU of this compute capability, with a torch for this CUDA."""
        raise NotImplementedError


def _capability() -> tuple[int, int] | None:
    """Of this machine's GPU, where it has one."""
    import torch

    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def _numbers(version: str) -> Version:
    """2.20.2+g123 -> (2, 20, 2)."""
    from packaging.version import Version as Parsed

    return Parsed(version).release


def shown(capability: tuple[int, int]) -> str:
    """(9, 0) -> sm_90."""
    return "sm_{}{}".format(*capability)


__all__ = ["TeRecipe", "shown"]
