"""What the audit looks at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from dsplugins.contracts import Plan, Settings
    from dsplugins.finalize import GradientChain
    from dsplugins.manager import Plugins
    from dsplugins.routers import Balance


class Standing(Protocol):
    """One rank's modules, as far as they can be built without memory; `stages.Stage` is one."""

    @property
    def plan(self) -> Plan:
        """The recipe, with its plugins chosen."""

    @property
    def settings(self) -> Settings:
        """megatron-core's configuration objects."""

    @property
    def plugins(self) -> Plugins:
        """Who owns which slot."""

    @property
    def chunks(self) -> Sequence[Any]:
        """Model chunks; in a run they are wrapped for data parallelism."""


class Placed(Standing, Protocol):
    """The same among other ranks; `assemble.Forward` is one."""

    @property
    def configs(self) -> Sequence[Any]:
        """Configuration objects that the loop writes scheduled values to."""


class Built(Placed, Protocol):
    """One rank's run before its first step; `assemble.Assembly` is one."""

    @property
    def optimizer(self) -> Any:
        """The optimizer slot's."""

    @property
    def forward_backward(self) -> Callable[..., Any]:
        """What the loop calls in each step."""

    @property
    def balance(self) -> Balance:
        """What moves the routers' biases."""

    @property
    def chain(self) -> GradientChain:
        """What runs between backward and optimizer."""
