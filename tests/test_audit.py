"""Each silent trap, provoked: the audit names it."""

from __future__ import annotations

import pytest
from built import tiny_model


def tampered(kind: str) -> str:
    """Build, spoil one thing, audit; the message, or "" if nothing was noticed."""
    from functools import partial
    from unittest import mock

    import torch
    from megatron.core.transformer.moe.router import TopKRouter

    from dsplugins import audit, model

    with tiny_model() as (plan, settings, plugins, chunks):
        chunk, config = chunks[0], settings.model
        layer, last = chunk.decoder.layers[1], chunk.mtp.layers[0].mtp_model_layer
        if kind == "unknown balance":
            config.moe_router_load_balancing_type = "blance"
        elif kind == "fp8 without a library":
            config.fp8 = "e4m3"
        elif kind == "twice updated biases":
            config.moe_router_enable_expert_bias = True
        elif kind == "mock":
            layer.self_attention.linear_proj.extra = mock.MagicMock()
        elif kind == "projection":
            built = layer.self_attention.linear_q_up_proj
            built.__class__ = type("Fused", (type(built),), {})
        elif kind == "core attention":
            layer.self_attention.core_attention = torch.nn.Identity()
        elif kind == "attention":
            layer.self_attention.__class__ = type("Other", (type(layer.self_attention),), {})
        elif kind == "router of MTP":
            stock = partial(TopKRouter, config=config, pg_collection=None)
            with mock.patch.object(TopKRouter, "__init__", lambda self, **_: torch.nn.Module.__init__(self)):
                last.mlp.router = stock()
        elif kind == "dispatcher":
            base = type(layer.mlp.token_dispatcher).__mro__[1]
            layer.mlp.token_dispatcher.__class__ = base
        elif kind == "experts":
            layer.mlp.experts = torch.nn.Identity()
        elif kind == "dense for experts":
            layer.mlp = chunk.decoder.layers[0].mlp
        elif kind == "no MTP block":
            chunk.mtp = None
        wrapped = model.wrap(chunks, settings)
        optimizer = plugins.slot("optimizer", config=settings.optimizer, chunks=wrapped)
        try:
            audit.audit(plan, settings, plugins, wrapped, optimizer)
        except audit.AuditFailure as failure:
            return str(failure)
        return ""


TRAPS = {
    "unknown balance": "would balance nothing",
    "fp8 without a library": "would train in 16 bits",
    "twice updated biases": "updated twice",
    "mock": "is a mock",
    "projection": "linear_q_up_proj is Fused",
    "core attention": "core attention is Identity",
    "attention": "attention is Other",
    "router of MTP": "mtp.0: router is TopKRouter",
    "dispatcher": "dispatcher is MoEAlltoAllTokenDispatcher",
    "experts": "experts is Identity",
    "dense for experts": "mlp is MLP",
    "no MTP block": "no MTP block was built",
}


def test_an_untouched_model_passes(workers):
    assert workers(1).run(tampered, "nothing")[0] == ""


@pytest.mark.parametrize("kind", TRAPS)
def test_a_trap_is_named(workers, kind):
    assert TRAPS[kind] in workers(1).run(tampered, kind)[0]
