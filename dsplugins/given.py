"""What hooks give, looked at where they give it: a wrong type is told before anybody stumbles over it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from dsplugins import contracts

BACKEND = ("column_parallel_linear", "row_parallel_linear", "layer_norm", "core_attention", "activation_func")
"""What is asked of a `BackendSpecProvider` here; core's protocol has more."""
OPTIMIZER = ("step", "zero_grad", "scale_loss", "get_grad_norm", "param_groups")
"""What is asked of a `MegatronOptimizer`."""


def look(hook: str, given: Any) -> Any:
    """What `hook` gave, as it can be used: what is made one after the other (`yield`) as a list.

    Raises TypeError that says what was given and what is wanted. None is left to whoever asked.
    """
    if given is None or hook not in WANTED:
        return given
    return WANTED[hook](given)


def _problems(given: Any) -> list[contracts.Problem]:
    listed = list(given) if isinstance(given, Iterable) and not isinstance(given, str | Mapping) else [given]
    strange = [one for one in listed if not isinstance(one, contracts.Problem)]
    if strange:
        raise TypeError(f"gave {_shown(strange[0])}, not a Problem: every one is contracts.Problem(...)")
    return listed


def _mapping(given: Any) -> Any:
    if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
        raise TypeError(f"gave {_shown(given)}, not a mapping of names to values")
    return given


def _true(given: Any) -> Any:
    if given is not True:
        raise TypeError(f"gave {_shown(given)}, not True")
    return given


def _factory(given: Any) -> Any:
    """A module is callable, too: it would be called with a factory's arguments."""
    if not callable(given) or hasattr(given, "named_parameters") and not isinstance(given, type):
        raise TypeError(f"gave {_shown(given)}, not a factory: give its class, or a partial of it")
    return given


def _attention(given: Any) -> Any:
    from megatron.core.transformer.spec_utils import ModuleSpec

    if not isinstance(given, ModuleSpec):
        raise TypeError(f"gave {_shown(given)}, not a ModuleSpec")
    return given


def _mtp(given: Any) -> Any:
    """megatron-core's own builder gives the submodules alone, which its block takes as well."""
    from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec

    if not isinstance(given, ModuleSpec | MultiTokenPredictionBlockSubmodules):
        raise TypeError(f"gave {_shown(given)}, not a ModuleSpec")
    return given


def _having(wanted: str, members: Iterable[str]) -> Callable[[Any], Any]:
    """A check for an object with all `members`, which `wanted` describes."""
    names = tuple(members)

    def check(given: Any) -> Any:
        if isinstance(given, type):
            raise TypeError(f"gave the class {given.__name__}, not an object of it")
        # A property is looked for on the class: reading it may take long, or fail for reasons of its own.
        missing = [name for name in names if not hasattr(type(given), name) and not hasattr(given, name)]
        if missing:
            raise TypeError(f"gave {_shown(given)}, not a {wanted}: it has no {', '.join(missing)}")
        return given

    return check


def _members(protocol: type) -> list[str]:
    """Fields, properties and methods of one of the contract's protocols."""
    own = [
        name
        for name, member in vars(protocol).items()
        if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property))
    ]
    return [*inspect.get_annotations(protocol), *own]


def _protocol(protocol: type) -> Callable[[Any], Any]:
    return _having(f"contracts.{protocol.__name__}", _members(protocol))


def _shown(given: Any) -> str:
    """`str 'gpipe'`, `list [1]`; the type alone where the value would be long."""
    value = repr(given)
    return type(given).__name__ + (f" {value}" if len(value) <= 40 and "\n" not in value else "")


WANTED: dict[str, Callable[[Any], Any]] = {
    "ds_settings": _mapping,
    "ds_check": _problems,
    "ds_here": _problems,
    "ds_check_built": _problems,
    "ds_platform": _protocol(contracts.Platform),
    "ds_data": _protocol(contracts.Data),
    "ds_backend": _having("BackendSpecProvider", BACKEND),
    "ds_precision": _having("BackendSpecProvider", BACKEND),
    "ds_attention": _attention,
    "ds_router": _factory,
    "ds_experts": _factory,
    "ds_dispatcher": _factory,
    "ds_mtp": _mtp,
    "ds_model": _factory,
    "ds_recompute": _true,
    "ds_schedule": _protocol(contracts.PipelineSchedule),
    "ds_optimizer": _having("MegatronOptimizer", OPTIMIZER),
    "ds_state": _protocol(contracts.PluginState),
    "ds_step_end": _mapping,
    "ds_run_end": _mapping,
}
"""Hook -> what looks at its answer; the other hooks give nothing."""


__all__ = ["look"]
