"""Words and wishes that megatron-core takes and ignores: refused before anything is built, or audited."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
from audit.provoke import BF16, DENSE, INTERLEAVED
from runs import SEQUENTIAL

SELECTIVE = ["model.recompute_granularity=selective"]

# -- by a recipe alone -----------------------------------------------------------------------------

ASKED = {
    "fp8 is set, transformer-engine is absent: megatron-core would train in 16 bits": [
        *DENSE,
        *BF16,
        "plugins.mtp=null",
        "model.fp8=e4m3",
    ],
    "model.moe_grouped_gemm=True has no effect: sequential decides": [
        *SEQUENTIAL,
        "model.moe_grouped_gemm=true",
    ],
    "model.qk_l2_norm=True has no effect: mla decides": ["model.qk_l2_norm=true"],
    "model.qk_clip=True has no effect: the loop clips": ["model.qk_clip=true"],
    "model.use_mup=True has no effect: all weights": ["model.use_mup=true"],
    "model.embedding_init_method_std=0.5 has no effect": ["model.embedding_init_method_std=0.5"],
    "model.apply_residual_connection_post_layernorm=True has no effect": [
        "model.apply_residual_connection_post_layernorm=true"
    ],
    "model.moe_token_dropping=True has no effect": ["model.moe_token_dropping=true"],
    "model.first_last_layers_bf16=True has no effect without": ["model.first_last_layers_bf16=true"],
    "model.fp8_wgrad=False has no effect without megatron-core's own fp8": ["model.fp8_wgrad=false"],
    "model.fp8_dot_product_attention=True has no effect without": ["model.fp8_dot_product_attention=true"],
    "model.fp8_recipe=blockwise has no effect without": ["model.fp8_recipe=blockwise"],
    "ddp.fp8_param_gather=True has no effect without": ["ddp.fp8_param_gather=true"],
    "optimizer.fp8_recipe=blockwise has no effect without": ["optimizer.fp8_recipe=blockwise"],
    "model.moe_mlp_glu_interleave_size=8 has no effect: grouped decides": [
        "model.moe_mlp_glu_interleave_size=8"
    ],
    "model.gtp_weight_remat_size=2 has no effect: the loop makes process groups without it": [
        "model.gtp_weight_remat_size=2"
    ],
    "model.cache_mla_latents=True has no effect: the loop only trains": ["model.cache_mla_latents=true"],
    "recompute_modules=['mla_up_proj'] has no effect": ["model.recompute_modules=[mla_up_proj]"],
}


def asked(said: str) -> list[str]:
    from audit.provoke import unaudited, verdict

    with unaudited(*ASKED[said]) as run:
        return verdict(run)


@pytest.mark.parametrize("said", ASKED)
def test_what_a_recipe_asks_for_in_vain(workers, said):
    (found,) = workers(1).run(asked, said)
    assert any(said in line for line in found), found


# -- by a plugin that writes the wrong thing -------------------------------------------------------


def writing(plugin: str, **changes: Any) -> Any:
    """The plugin of that class writes other fields: a value of None leaves one out."""
    from audit.provoke import hook

    from dsplugins.plugins.attention.mla import Mla
    from dsplugins.plugins.mtp.mtp import Mtp
    from dsplugins.plugins.router.aux_free import AuxFree
    from dsplugins.plugins.schedule.interleaved import Interleaved

    cls = {c.__name__: c for c in (Mla, Mtp, AuxFree, Interleaved)}[plugin]
    own = cls.ds_settings

    def ds_settings(self, plan):
        written = dict(own(self, plan=plan)) | {f"model.{name}": value for name, value in changes.items()}
        return {name: value for name, value in written.items() if value is not None}

    return mock.patch.object(cls, "ds_settings", hook(ds_settings))


WRITTEN: dict[str, tuple[int, list[str], str, dict[str, Any]]] = {
    "moe_router_load_balancing_type 'seq_aux_los' is unknown": (
        *(1, [], "AuxFree"),
        {"moe_router_load_balancing_type": "seq_aux_los"},
    ),
    "moe_aux_loss_coeff=0.0001 has no effect": (
        *(1, [], "AuxFree"),
        {"moe_router_load_balancing_type": "none"},
    ),
    "model.mtp_num_layers=1 but no plugin fills the slot mtp": (
        *(1, ["plugins.mtp=null"], "AuxFree"),
        {"mtp_num_layers": 1},
    ),
    "balances nothing: nobody gave moe_aux_loss_coeff": (1, [], "AuxFree", {"moe_aux_loss_coeff": None}),
    "mtp fills the slot mtp but model.mtp_num_layers is not set": (1, [], "Mtp", {"mtp_num_layers": None}),
    "two stages of several chunks need overlap_p2p_comm=True": (
        *(2, INTERLEAVED, "Interleaved"),
        {"overlap_p2p_comm": False, "batch_p2p_comm": True},
    ),
}


def written(said: str) -> list[str]:
    from audit.provoke import unaudited, verdict

    _, overrides, plugin, changes = WRITTEN[said]
    with writing(plugin, **changes), unaudited(*overrides) as run:
        return verdict(run)


@pytest.mark.parametrize("said", WRITTEN)
def test_what_a_plugin_writes_in_vain(workers, said):
    for found in workers(WRITTEN[said][0]).run(written, said):
        assert any(said in line for line in found), found


def scaled_softmax() -> tuple[list[str], float]:
    """Nobody writes the factor that megatron-core then takes: 40, whatever `rope_type` is."""
    from audit.provoke import hook, unaudited, verdict

    from dsplugins.plugins.attention.mla import Mla

    silent = mock.patch.object(Mla, "ds_check", hook(lambda self, plan, settings: []))
    with writing("Mla", rotary_scaling_factor=None), silent, unaudited("model.mscale_all_dim=1.0") as run:
        return verdict(run), 12**-0.5


def test_yarns_softmax_scale_without_yarn(workers):
    ((found, plain),) = workers(1).run(scaled_softmax)
    told = f"scales the softmax by {1.87385420709 * plain:.6g}, the recipe by {plain:.6g}"
    assert any(line.startswith("decoder.0-3, mtp.0: ") and told in line for line in found), found


def yarn() -> list[str]:
    from audit.provoke import unaudited, verdict

    fields = ("rope_type=yarn", "rotary_scaling_factor=40", "mscale=1.0", "mscale_all_dim=1.0")
    with unaudited(*(f"model.{field}" for field in fields)) as run:
        return verdict(run)


def test_yarn_itself_is_fine(workers):
    assert workers(1).run(yarn)[0] == []


# -- by hand: what no recipe and no plugin here brings about ------------------------------------


def spoil(run: Any, **changes: Any) -> None:
    for name, value in changes.items():
        setattr(run.settings.model, name, value)


SPOILT: dict[str, dict[str, Any]] = {
    "moe_router_enable_expert_bias is set": {"moe_router_enable_expert_bias": True},
    "quant_recipe is set, transformer-engine is absent": {"quant_recipe": object()},
    "model.moe_router_topk was to be 2, megatron-core holds 1": {"moe_router_topk": 1},
    "model.layernorm_epsilon was to be 1e-06, megatron-core holds 1e-05": {"layernorm_epsilon": 1e-5},
}


def by_hand(said: str) -> list[str]:
    from audit.provoke import unaudited, verdict

    with unaudited() as run:
        spoil(run, **SPOILT[said])
        return verdict(run)


@pytest.mark.parametrize("said", SPOILT)
def test_what_is_not_held(workers, said):
    (found,) = workers(1).run(by_hand, said)
    assert any(said in line for line in found), found


# -- refused before anything is built --------------------------------------------------------------

REFUSED = {
    "slot mtp is empty": ["plugins.mtp=null", "model.mtp_num_layers=1"],
    "model.rotary_scaling_factor has two writers": ["model.rotary_scaling_factor=40"],
    "model.mscale_all_dim is not given": ["model.rope_type=yarn", "model.rotary_scaling_factor=40"],
    "model.mla_down_proj_fusion is ignored by mla": ["model.mla_down_proj_fusion=true"],
    "model.softmax_scale is ignored by mla": ["model.softmax_scale=0.5"],
    "model.num_query_groups is ignored by mla": ["model.num_query_groups=1"],
    "model.add_qkv_bias is ignored by mla": ["model.add_qkv_bias=true"],
    "model.moe_router_pre_softmax=True would have no effect": ["model.moe_router_pre_softmax=true"],
    "model.moe_shared_expert_overlap=True: the shared experts would be left out": [
        "model.moe_shared_expert_overlap=true"
    ],
    "layernorm is made for the norms of TransformerEngine": [
        *SELECTIVE,
        "model.recompute_modules=[layernorm]",
    ],
    "model.moe_router_enable_expert_bias has two writers": ["model.moe_router_enable_expert_bias=true"],
    "model.moe_router_score_function has two writers": ["model.moe_router_score_function=softmax"],
    "model.moe_router_load_balancing_type has two writers": ["model.moe_router_load_balancing_type=none"],
    "model.moe_token_dispatcher_type has two writers": ["model.moe_token_dispatcher_type=flex"],
    "model.transformer_impl has two writers": ["model.transformer_impl=transformer_engine"],
    "model.overlap_p2p_comm has two writers": [*INTERLEAVED, "model.overlap_p2p_comm=false"],
    "model.moe_z_loss_coeff=0.001 would have no effect": ["model.moe_z_loss_coeff=0.001"],
    "ddp.grad_reduce_in_fp32 has two writers": ["ddp.grad_reduce_in_fp32=false"],
}


def refusals() -> dict[str, str]:
    """What is said of each, by the same words."""
    from runs import TINY

    from dsplugins.contracts import RecipeError
    from dsplugins.plan import prepare
    from dsplugins.recipe import Recipe
    from dsplugins.settings import settle

    answers = {}
    for said, overrides in REFUSED.items():
        world = 2 if "parallel.pipeline=2" in overrides else 1
        try:
            recipe = Recipe.load(TINY, [*overrides, f"run.world_size={world}"])
            plugins, plan = prepare(recipe)
            settle(plan, plugins, recipe)
            answers[said] = "nothing"
        except RecipeError as error:
            answers[said] = "; ".join(problem.message for problem in error.problems)
    return answers


@pytest.fixture(scope="module")
def refused(workers):
    return workers(1).run(refusals)[0]


@pytest.mark.parametrize("said", REFUSED)
def test_what_is_refused(refused, said):
    assert said in refused[said]


def unknown_score() -> str:
    from audit.provoke import unaudited

    from dsplugins.contracts import RecipeError

    try:
        with writing("AuxFree", moe_router_score_function="sigmod"), unaudited():
            return "nothing"
    except RecipeError as error:
        return str(error)


def test_an_unknown_score_function_is_refused(workers):
    (said,) = workers(1).run(unknown_score)
    assert "moe_router_score_function='sigmod' is not one of softmax, sigmoid" in said
