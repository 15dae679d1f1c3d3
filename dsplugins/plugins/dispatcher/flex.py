"""What `deepep`, `hybridep` and `nccl_ep` share: megatron-core's flex dispatcher over a library's kernels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar

from dsplugins.contracts import DispatcherFactory, EnvironmentUnfit, Plan, Problem, Settings
from dsplugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import MLATransformerConfig

BACKENDS = ("deepep", "hybridep", "ncclep")
"""megatron-core's names; fields of one of them start with `moe_<name>_`."""


class Flex:
    """One backend of `MoEFlexTokenDispatcher`; an owner of the slot is a subclass with its own checks.

    Core fails on a missing library in the middle of building the model. Here it is one line beforehand, and
    `dsplugins check` builds with `alltoall` instead, which needs no library and adds no parameters either.
    """

    contract = ">=1.0,<2"
    stand_in: ClassVar[str] = "alltoall"
    name: ClassVar[str]
    """Of the plugin."""
    backend: ClassVar[str]
    """One of BACKENDS."""
    capability: ClassVar[tuple[int, int]] = (9, 0)
    """The oldest GPUs that the library's kernels run on, as `torch.cuda.get_device_capability` says it."""
    have: ClassVar[str]
    """Name in core's `fused_a2a` that is true where core could import the library."""
    get: ClassVar[str]
    """What to do where it can't."""

    def __init__(self, options: Any) -> None:
        self._options = options

    @property
    def _key(self) -> str:
        return f"plugins.{self.name}"

    @hookimpl
    def ds_settings(self, plan: Plan) -> Mapping[str, object]:
        """The dispatcher and its backend, probabilities in FP32 as all three send them, and the options."""
        asked = {f"model.{field}": value for field, value in asdict(self._options).items()}
        return {
            "model.moe_token_dispatcher_type": "flex",
            "model.moe_flex_dispatcher_backend": self.backend,
            "model.moe_router_dtype": "fp32",
            **{key: value for key, value in asked.items() if value is not None},
        }

    @hookimpl
    def ds_check(self, plan: Plan, settings: Settings) -> Iterable[Problem]:
        """What core ignores or fails on in the first step; and what this machine lacks."""
        yield from self._ignored(settings)
        yield from self._unfit(plan, settings)
        yield from self.unfit(plan, settings)
        yield from self.library()
        yield from self._devices()

    @hookimpl
    def ds_dispatcher(self, config: MLATransformerConfig) -> DispatcherFactory:
        """Core's own. Raises EnvironmentUnfit where core couldn't import the library."""
        from megatron.core.transformer.moe import fused_a2a
        from megatron.core.transformer.moe.token_dispatcher import MoEFlexTokenDispatcher

        if not getattr(fused_a2a, self.have):
            raise EnvironmentUnfit(f"{self._key}: megatron-core could not import its library: {self.get}")
        return MoEFlexTokenDispatcher

    def unfit(self, plan: Plan, settings: Settings) -> Iterator[Problem]:
        """Recipes that this backend can't run."""
        yield from ()

    def library(self) -> Iterator[Problem]:
        """What is missing of the library here, told from its files: importing it takes a GPU."""
        yield from ()

    def lacks(self, said: str) -> Problem:
        """A problem of this machine."""
        return Problem(f"{self._key}: {said}", self._key, self.get, kind="environment")

    def _ignored(self, settings: Settings) -> Iterator[Problem]:
        """Overlapped shared experts, as with `alltoall`, and fields of the other backends."""
        if settings.model.moe_shared_expert_overlap:
            key = "model.moe_shared_expert_overlap"
            said = f"{key}=True: the shared experts would be left out, {self.name} isn't given them"
            yield Problem(said, key, "leave it out: the shared experts then run on their own")
        others = tuple(f"model.moe_{backend}_" for backend in BACKENDS if backend != self.backend)
        for key in settings.writers:
            if key.startswith(others):
                yield Problem(f"{key} means nothing to {self.name}", key, "leave it out")

    def _unfit(self, plan: Plan, settings: Settings) -> Iterator[Problem]:
        """What none of the three can do: no GPU, nothing to send to, any format but BF16."""
        if plan.slots.get("platform") == "cpu":
            said = f"the dispatcher {self.name} needs CUDA, but the platform is cpu"
            yield Problem(said, self._key, "name the platform cuda or the dispatcher alltoall")
        if plan.layout.expert * plan.layout.expert_tensor == 1:
            said = f"the dispatcher {self.name} needs parallel.expert x parallel.expert_tensor above 1"
            yield Problem(said, self._key, "spread the experts, or name the dispatcher alltoall")
        if not settings.model.bf16:
            said = f"the dispatcher {self.name} sends BF16 only, the model isn't in BF16"
            yield Problem(said, self._key, "name the precision bf16 or the dispatcher alltoall")

    def _devices(self) -> Iterator[Problem]:
        """GPUs that are too old. None to be seen: the platform says so."""
        import torch

        if not torch.cuda.is_available():
            return
        found = torch.cuda.get_device_capability()
        if found < self.capability:
            needs, has = (".".join(map(str, version)) for version in (self.capability, found))
            said = f"needs GPUs of compute capability {needs}, this one has {has}"
            remedy = "name the dispatcher alltoall"
            yield Problem(f"{self._key}: {said}", self._key, remedy, kind="environment")


__all__ = ["BACKENDS", "Flex"]
