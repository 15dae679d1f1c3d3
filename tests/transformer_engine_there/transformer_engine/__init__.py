"""A TransformerEngine that is there and that nobody asked for: core finds every name, and using one fails."""

import contextlib
import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec

import torch

__version__ = "2.9.0"


def unasked(name):
    """A class for core to take, to derive from and to compare with; the optimizers can be made, too."""

    def refuse(self, *given, **named):
        if not name.startswith("Fused"):
            raise AssertionError(f"nobody asked for TransformerEngine's {name}")
        torch.optim.Optimizer.__init__(self, *given, named["params"], {"lr": named["lr"]})

    bases = (torch.optim.Optimizer,) if name.startswith("Fused") else ()
    return type(name, bases, {"__init__": refuse, "apply": refuse})


def not_offloaded(enabled, *given):
    """Core asks for this in every model, to offload nothing."""
    assert not enabled
    return contextlib.nullcontext(), lambda x: x


class Everything(MetaPathFinder, Loader):
    """Each module below `transformer_engine`, with whatever name is asked for."""

    def find_spec(self, name, path=None, target=None):
        inside = name.startswith(("transformer_engine.", "transformer_engine_torch"))
        return ModuleSpec(name, self, is_package=True) if inside else None

    def exec_module(self, module):
        made = {}

        def attribute(name):
            if name.startswith("__"):
                raise AttributeError(name)
            if name == "get_cpu_offload_context":
                return not_offloaded
            if name in ("recipe", "attention", "module", "tensor", "ops"):
                return import_module(f"{module.__name__}.{name}")
            return made.setdefault(name, unasked(name))

        module.__getattr__ = attribute


sys.meta_path.append(Everything())

from transformer_engine import common, pytorch  # noqa: E402, F401
