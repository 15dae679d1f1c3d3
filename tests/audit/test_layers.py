"""Another class in any slot of any layer is named, put there by hand or by a plugin of its own mind."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
from runs import SEQUENTIAL

PROJECTIONS = [f"linear_{x}" for x in ("q_down_proj", "q_up_proj", "kv_down_proj", "kv_up_proj", "proj")]
PARTS = {
    "": "layer",
    "self_attention": "attention",
    "self_attention.core_attention": "core attention",
    **{f"self_attention.{name}": name for name in PROJECTIONS},
    "input_layernorm": "input norm",
    "pre_mlp_layernorm": "pre-MLP norm",
    "self_attention.q_layernorm": "q_layernorm",
    "self_attention.kv_layernorm": "kv_layernorm",
}
DENSE = {"mlp": "mlp", "mlp.linear_fc1": "mlp linear_fc1", "mlp.linear_fc2": "mlp linear_fc2"}
EXPERTS = {
    "mlp.router": "router",
    "mlp.experts": "experts",
    "mlp.token_dispatcher": "dispatcher",
    "mlp.shared_experts": "shared experts",
    **{f"mlp.experts.local_experts.0.{name}": f"experts {name}" for name in ("linear_fc1", "linear_fc2")},
    **{f"mlp.shared_experts.{name}": f"shared experts {name}" for name in ("linear_fc1", "linear_fc2")},
}
AROUND_MTP = {
    "eh_proj": ("mtp.0", "eh_proj"),
    **{name: (f"mtp.0.{name}", "norm") for name in ("enorm", "hnorm", "final_layernorm")},
}


def swapped() -> list[tuple[str, list[str]]]:
    """(what should be said, what was) for each part, made an instance of a subclass for one audit."""
    from audit.provoke import unaudited, verdict

    answers = []
    with unaudited(*SEQUENTIAL) as run:
        assert verdict(run) == []
        chunk = bare(run)
        block = chunk.mtp.layers[0]
        layers = {"decoder.0": chunk.decoder.layers[0], "decoder.2": chunk.decoder.layers[2]}
        layers["mtp.0"] = block.mtp_model_layer
        swaps = [
            (part(layer, path), f"{name}: {slot} is Other")
            for name, layer in layers.items()
            for path, slot in (PARTS | (DENSE if name == "decoder.0" else EXPERTS)).items()
        ]
        swaps += [
            (getattr(block, path), f"{name}: {slot} is Other") for path, (name, slot) in AROUND_MTP.items()
        ]
        swaps.append((chunk.decoder.final_layernorm, "decoder.final_layernorm: norm is Other"))
        for stands, said in swaps:
            own = type(stands)
            stands.__class__ = type("Other", (own,), {})
            answers.append((said, verdict(run)))
            stands.__class__ = own
        assert verdict(run) == []
    return answers


def bare(run: Any) -> Any:
    from dsplugins.model import bare

    return bare(run.chunks[0])


def part(layer: Any, path: str) -> Any:
    for name in path.split(".") if path else ():
        layer = layer[int(name)] if name.isdigit() else getattr(layer, name)
    return layer


def test_each_part_of_each_layer(workers):
    (answers,) = workers(1).run(swapped)
    assert len(answers) == 12 + 3 + 2 * (12 + 8) + 4 + 1
    for said, found in answers:
        assert any(line.startswith(said) for line in found), (said, found)


# -- what plugins and megatron-core do by themselves -----------------------------------------------


def stock_mtp(self, config, decoder, backend):
    """An MTP block as core builds it: from stock parts, whatever the decoder is made of."""
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_layer_specs,
        get_gpt_mtp_block_spec_for_backend,
    )
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    layers = get_gpt_decoder_layer_specs(config, use_transformer_engine=False)
    layers[-1].submodules.self_attention.submodules.core_attention = backend.core_attention()
    block = TransformerBlockSubmodules(layer_specs=layers, layer_norm=decoder.layer_norm)
    return get_gpt_mtp_block_spec_for_backend(config, block, backend)


def spoil_mock(run: Any) -> None:
    bare(run).decoder.layers[1].self_attention.linear_proj.extra = mock.MagicMock()


def spoil_dense(run: Any) -> None:
    layers = bare(run).decoder.layers
    layers[1].mlp = layers[0].mlp


def spoil_shared(run: Any) -> None:
    bare(run).decoder.layers[1].mlp.shared_experts = None


def spoil_unasked(run: Any) -> None:
    run.settings.model.moe_shared_expert_intermediate_size = None


def spoil_overlap(run: Any) -> None:
    run.settings.model.moe_shared_expert_overlap = True


SPOILT = {
    "is a mock: a library": spoil_mock,
    "decoder.1: mlp is MLP, chosen was experts": spoil_dense,
    "decoder.1: shared experts is NoneType": spoil_shared,
    "decoder.1-3, mtp.0: shared experts stand there": spoil_unasked,
    "decoder.1-3, mtp.0: moe_shared_expert_overlap: the dispatcher does not run": spoil_overlap,
}


def by_hand(said: str) -> list[str]:
    from audit.provoke import unaudited, verdict

    with unaudited() as run:
        SPOILT[said](run)
        return verdict(run)


@pytest.mark.parametrize("said", SPOILT)
def test_a_part_that_should_not_be_there(workers, said):
    (found,) = workers(1).run(by_hand, said)
    assert any(said in line for line in found), found


def with_stock_mtp() -> list[str]:
    from audit.provoke import hook, unaudited, verdict

    from dsplugins.plugins.mtp.mtp import Mtp

    with mock.patch.object(Mtp, "ds_mtp", hook(stock_mtp)), unaudited() as run:
        return verdict(run)


def test_an_mtp_block_of_stock_parts(workers):
    (found,) = workers(1).run(with_stock_mtp)
    for said in ("attention is MLASelfAttention", "mlp is MoELayer, chosen was experts"):
        assert any(line.startswith("mtp.0: ") and said in line for line in found), found


def with_uncalled_projection() -> list[str]:
    """An up-projection given as a function: core's `build_module` hands it back as it is."""
    from audit.provoke import hook, unaudited, verdict

    from dsplugins.plugins.attention.mla import Mla

    own = Mla.ds_attention

    def lazily(*args, **kwargs):
        raise AssertionError("core would have called it")

    def ds_attention(self, config, backend):
        spec = own(self, config=config, backend=backend)
        spec.submodules.linear_q_up_proj = lazily
        return spec

    with mock.patch.object(Mla, "ds_attention", hook(ds_attention)), unaudited() as run:
        return verdict(run)


def test_a_function_that_core_never_called(workers):
    (found,) = workers(1).run(with_uncalled_projection)
    assert found == [
        "decoder.0-3, mtp.0: linear_q_up_proj is the function lazily, which is no module: "
        "megatron-core did not call it"
    ]


def with_norms_left_out() -> list[str]:
    """Core's own attention whose norms are identities, where core has a projection with a norm inside."""
    from audit.provoke import hook, unaudited, verdict
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer import mla_qk_norm_config
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.multi_latent_attention import MLASelfAttention

    from dsplugins.plugins.attention.mla import Mla
    from dsplugins.plugins.backend.local_provider import TorchLocalProvider

    class Fused(ColumnParallelLinear):
        """Stands for TransformerEngine's LayerNormLinear."""

    class Core(TorchLocalProvider):
        def column_parallel_layer_norm_linear(self):
            return Fused

    own = Mla.ds_attention

    def without_norms(self, config, backend):
        spec = own(self, config=config, backend=backend)
        spec.module = MLASelfAttention
        spec.submodules.q_layernorm = spec.submodules.kv_layernorm = IdentityOp
        return spec

    with (
        mock.patch.object(mla_qk_norm_config, "get_backend", lambda *_: Core()),
        mock.patch.object(Mla, "ds_attention", hook(without_norms)),
        unaudited() as run,
    ):
        return verdict(run)


def test_core_s_resolver_puts_other_projections_in_the_place_of_those_that_were_named(workers):
    found = " ".join(workers(1).run(with_norms_left_out)[0])
    for up in ("q", "kv"):
        assert f"linear_{up}_up_proj is Fused, chosen was ColumnParallelLinear" in found


# -- a number format that wraps the backend's linears ----------------------------------------------


def wrapped(ignored: bool, *overrides: str) -> list[str]:
    """A precision slot with linears of its own; `ignored` by the attention plugin or not."""
    from audit.provoke import hook, unaudited, verdict
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    from dsplugins.plugins.attention.mla import Mla
    from dsplugins.plugins.backend.local_provider import TorchLocalProvider
    from dsplugins.plugins.precision.fp32 import Fp32

    class Column(ColumnParallelLinear):
        """Stands for an FP8 one."""

    class Row(RowParallelLinear):
        """Stands for an FP8 one."""

    class Provider(TorchLocalProvider):
        def column_parallel_linear(self):
            return Column

        def row_parallel_linear(self):
            return Row

    own = Mla.ds_attention
    ignoring = hook(lambda self, config, backend: own(self, config=config, backend=TorchLocalProvider()))
    wrapping = hook(lambda self, config, backend: Provider())
    with (
        mock.patch.object(Fp32, "ds_precision", wrapping),
        mock.patch.object(Mla, "ds_attention", ignoring if ignored else own),
        unaudited(*overrides) as run,
    ):
        return verdict(run)


def test_it_reaches_everything(workers):
    """Attention, dense MLP, routed and shared experts, MTP: nothing to complain about."""
    assert workers(1).run(wrapped, False, *SEQUENTIAL)[0] == []


def cores_mlp(brought: bool) -> list[str]:
    """fp8_v3, with an MLP of core's in the first layer; `brought` by the number format itself, or not."""
    from audit.provoke import unaudited, verdict
    from megatron.core.transformer.mlp import MLP

    from dsplugins.plugins.precision.fp8.provider import Fp8Provider

    with (
        mock.patch.object(Fp8Provider, "dense_mlp", (lambda self: MLP) if brought else Fp8Provider.dense_mlp),
        unaudited("plugins.fp32=null", "plugins.fp8_v3={}") as run,
    ):
        bare(run).decoder.layers[0].mlp.__class__ = MLP
        return verdict(run)


def test_a_dense_mlp_is_the_one_that_it_brings(workers):
    assert workers(1).run(cores_mlp, False)[0] == ["decoder.0: mlp is MLP, chosen was Fp8MLP"]
    assert workers(1).run(cores_mlp, True)[0] == []


def test_experts_that_it_does_not_reach(workers):
    (found,) = workers(1).run(wrapped, False)
    assert found == [
        "decoder.1-3, mtp.0: experts GroupedExperts have no linears: the number format does not reach them"
    ]


def test_attention_that_it_does_not_reach(workers):
    (found,) = workers(1).run(wrapped, True)
    told = "decoder.0-3, mtp.0: self_attention.linear_q_up_proj is ColumnParallelLinear"
    assert any(line.startswith(told) for line in found), found
