"""megatron-core as it would be with DeepEP, HybridEP and NCCL EP installed, for a while."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from unittest import mock

from transports import deep_ep, te_ep

NAMES = (
    *("fused_dispatch", "fused_combine", "set_deepep_num_sms", "hybrid_ep_dispatch", "hybrid_ep_combine"),
    *("ensure_nccl_ep_bootstrapped", "new_nccl_ep_buffer", "nccl_ep_dispatch", "nccl_ep_combine"),
)
"""What core's token dispatcher took from `fused_a2a` when it was imported."""


@contextlib.contextmanager
def transports() -> Iterator[None]:
    """`fused_a2a` imported once more with the libraries there, and its functions where core uses them."""
    from megatron.core.transformer.moe import fused_a2a, token_dispatcher

    _reload(fused_a2a, _libraries())
    try:
        with contextlib.ExitStack() as stack:
            for name in NAMES:
                stack.enter_context(mock.patch.object(token_dispatcher, name, getattr(fused_a2a, name)))
            yield
    finally:
        te_ep.ep_finalize()
        _reload(fused_a2a, {"deep_ep": None, "transformer_engine.pytorch": None})


def _libraries() -> dict[str, ModuleType]:
    events = ModuleType("deep_ep.utils")
    events.EventHandle, events.EventOverlap = deep_ep.EventHandle, deep_ep.EventOverlap
    engine, torch_part = ModuleType("transformer_engine"), ModuleType("transformer_engine.pytorch")
    torch_part.ep = te_ep
    names = {"transformer_engine": engine, "transformer_engine.pytorch": torch_part}
    return {"deep_ep": deep_ep, "deep_ep.utils": events, **names}


def _reload(module: ModuleType, libraries: dict) -> None:
    with mock.patch.dict(sys.modules, libraries):
        importlib.reload(module)
