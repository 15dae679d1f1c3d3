"""No dead key: each key of the 671B recipe, changed, changes what is built, read, computed or written.

A case names the one aspect that its key must change, of a recipe shrunk by overrides. Keys are taken
from the recipe itself, so a new one without a case fails here.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import shrunk

from dsplugins.recipe import Recipe
from dsplugins.schedules import Schedule, parse_tokens

ASPECTS = {
    "shapes": shrunk.built,
    "weights": shrunk.built,
    "modules": shrunk.built,
    "optimizer": shrunk.built,
    "samples": shrunk.built,
    "kept bytes": shrunk.kept,
    "refused": shrunk.built,
    "losses": shrunk.stepped,
    "trained": shrunk.stepped,
    "metrics": shrunk.ran,
    "evaluations": shrunk.ran,
    "files": shrunk.ran,
}
"""Aspect -> the job that tells it."""


@dataclass(frozen=True)
class Case:
    """What to change, and what has to change with it."""

    aspect: str
    value: str
    """The key's new value."""
    given: tuple[str, ...] = ()
    """Overrides for both sides of the comparison."""
    also: tuple[str, ...] = ()
    """Overrides that the new value needs."""
    ranks: tuple[int, int] = (1, 1)
    """Processes before and after."""


EVEN_STAGES = ("model.pipeline_model_parallel_layout=null", "model.num_layers=4")
TWO = ("run.world_size=2",)
STAGES = (*TWO, "parallel.pipeline=2", "model.pipeline_model_parallel_layout=Et|ttmL")
SEQUENTIAL = ("plugins={grouped: null, sequential: {}}",)

MODEL = {
    "normalization": Case("shapes", "LayerNorm"),
    "layernorm_epsilon": Case("losses", "1.0e-3"),
    "activation_func": Case("losses", "gelu"),
    "gated_linear_unit": Case("shapes", "false", given=SEQUENTIAL),
    "add_bias_linear": Case(
        "shapes", "true", given=(*SEQUENTIAL, "model.moe_shared_expert_intermediate_size=null")
    ),
    "hidden_dropout": Case("refused", "0.5"),  # masks would not go on where a run does
    "attention_dropout": Case("refused", "0.1"),
    "moe_router_dtype": Case("losses", "null"),
    "vocab_size": Case("shapes", "272"),
    "num_layers": Case("shapes", "4", given=("model.pipeline_model_parallel_layout=null",)),
    "hidden_size": Case("shapes", "48"),
    "ffn_hidden_size": Case("shapes", "80"),
    "num_attention_heads": Case("shapes", "4"),
    "q_lora_rank": Case("shapes", "24"),
    "kv_lora_rank": Case("shapes", "24"),
    "qk_head_dim": Case("shapes", "16"),
    "qk_pos_emb_head_dim": Case("shapes", "8"),
    "v_head_dim": Case("shapes", "16"),
    # At the report's 0.006 a model as narrow as this one attends to everything alike.
    "rope_type": Case("losses", "yarn", given=("model={mscale_all_dim: 1.0, init_method_std: 0.2}",)),
    "rotary_base": Case("losses", "100", given=("model.init_method_std=0.2",)),
    "init_method_std": Case("weights", "0.02"),
    "num_moe_experts": Case("shapes", "32"),
    "moe_ffn_hidden_size": Case("shapes", "24"),
    "moe_shared_expert_intermediate_size": Case("shapes", "24"),
    "moe_router_topk": Case("losses", "2"),
    "moe_router_num_groups": Case("losses", "2"),
    "moe_router_group_topk": Case("losses", "1"),
    "moe_router_topk_scaling_factor": Case("losses", "1.0"),
    "pipeline_model_parallel_layout": Case("shapes", "Ett|tmL", given=STAGES, ranks=(2, 2)),
}
SECTIONS = {
    "optimizer.adam_beta1": Case("trained", "0.5"),
    "optimizer.adam_beta2": Case("trained", "0.5"),
    "optimizer.adam_eps": Case("trained", "1.0e-2"),
    "optimizer.weight_decay": Case("trained", "0.5"),
    "optimizer.clip_grad": Case("trained", "0.1"),
    "data.seq_length": Case("samples", "8"),
    "train.tokens": Case("metrics", "64"),
    "train.global_batch": Case("losses", "8"),
    "train.learning_rate": Case("trained", "1.0e-2"),
    "train.micro_batch": Case("samples", "2"),
    "evaluate.every": Case("evaluations", "2"),
    "evaluate.sequences": Case("evaluations", "4"),
    "save.minutes": Case("files", "1.0e-9"),
    "run.directory": Case("files", "elsewhere"),
    "run.world_size": Case("samples", "2", ranks=(1, 2)),
    "parallel.pipeline": Case("shapes", "2", given=(*TWO, *EVEN_STAGES), ranks=(2, 2)),
    "parallel.expert": Case("shapes", "2", given=TWO, ranks=(2, 2)),
}
OPTIONS = {
    "gpt.dense_layers": Case("shapes", "2"),
    "aux_free.sequence_loss": Case("losses", "0.5"),
    "aux_free.update_rate": Case("trained", "0.1"),
    "mtp.depth": Case("shapes", "2", given=("model.pipeline_model_parallel_layout=null",)),
    "mtp.weight": Case("trained", "3.0"),
    "adamw.zero": Case("optimizer", "false"),
    "adamw.moments": Case("optimizer", "fp32"),
    "adamw.no_decay": Case("optimizer", "[]"),
    "v3_recompute.norms": Case("kept bytes", "false"),
    "v3_recompute.mla_up_proj": Case("kept bytes", "false"),
    "python_source.fim_rate": Case("samples", "0.9"),
    "python_source.validation": Case("samples", "0.4"),
    "expert_load.every": Case("metrics", "2"),
    "expert_load.plots": Case("files", "true"),
}
OWNERS = {
    "bf16": Case("shapes", "null", also=("plugins.fp32={}",)),
    "mla": Case("shapes", "null", ("plugins.v3_recompute.mla_up_proj=false",), ("plugins.gqa={}",)),
    "aux_free": Case("modules", "null", also=("plugins.aux_loss={}",)),
    "grouped": Case("shapes", "null", also=SEQUENTIAL),
    "alltoall": Case("modules", "null", also=("plugins.allgather={}",)),
    "mtp": Case("shapes", "null", also=("model.pipeline_model_parallel_layout=EtttL",)),
    "one_f_one_b": Case(
        "shapes",
        "null",
        (*TWO, *EVEN_STAGES, "parallel.pipeline=2"),
        ("plugins.interleaved={}", "parallel.virtual_pipeline=2"),
        (2, 2),
    ),
    "v3_recompute": Case("kept bytes", "null"),
    "expert_load": Case("metrics", "null"),
}
"""Plugins that another one can stand in for, or that can be left out."""
NEEDED = {
    "gpt": "slot model is empty",
    "adamw": "slot optimizer is empty",
    "python_source": "slot data is empty",
    "cuda": "slot platform is empty",
    "te": "slot backend is empty",
}
"""Plugins that can't be swapped for another one here: without them the recipe is refused."""
SCHEDULES = (
    "train.global_batch",
    "train.learning_rate",
    "plugins.aux_free.update_rate",
    "plugins.mtp.weight",
)
OTHER = {
    int: lambda number: number + 1,
    float: lambda number: number + 1.0e-6,
    str: lambda text: {"2000 steps": "1900 steps", "cosine": "linear"}.get(text) or sooner(text),
}
"""Type of a value in a schedule -> another value in its place."""
CASES = {
    **{f"model.{field}": case for field, case in MODEL.items()},
    **SECTIONS,
    **{f"plugins.{option}": case for option, case in OPTIONS.items()},
    **{f"plugins.{name}": case for name, case in OWNERS.items()},
}


def sooner(count):
    """A count of tokens, 1% less."""
    return parse_tokens(count) * 99 // 100


def keys():
    """Every key of the merged recipe: of its sections, of its plugins' options, and the plugins."""
    recipe = Recipe.load(shrunk.RECIPE)
    named = [(f"plugins.{name}", options) for name, options in recipe.plugins.items()]
    values = [*recipe.sections.items(), *named]
    return {f"{section}.{key}" for section, inside in values for key in inside} | {key for key, _ in named}


@pytest.fixture(scope="module")
def look(workers, tmp_path_factory):
    """What a job says on rank 0, once for each set of overrides of the shrunk recipe."""
    # Merged once: with all of its overrides again and again, merging would take longer than running.
    file = tmp_path_factory.mktemp("shrunk") / "v3_671b.yaml"
    file.write_text(Recipe.load(shrunk.RECIPE, shrunk.SHRUNK).resolved())
    known = {}

    def ask(job, ranks, overrides):
        wanted = (job, ranks, overrides)
        if wanted not in known:
            known[wanted] = workers(ranks).run(job, overrides, str(file))[0]
        return known[wanted]

    return ask


def test_every_key_has_a_case():
    assert keys() == {*CASES, *(f"plugins.{name}" for name in NEEDED)}


@pytest.mark.parametrize("key", CASES)
def test_key_is_alive(look, key):
    case = CASES[key]
    job, (before, after) = ASPECTS[case.aspect], case.ranks
    # Swaps name the new owner before the old one goes, or the pair in one override.
    changed = look(job, after, (*case.given, *case.also, f"{key}={case.value}"))
    if case.aspect == "refused":
        assert changed["refused"] == [key]
        return
    base = look(job, before, case.given)
    assert changed.keys() == base.keys()
    assert changed[case.aspect] != base[case.aspect]


def test_a_dead_key_would_be_found(look):
    """A run with a field that nothing reads is the same as one without, in every aspect."""
    dead = ("model.masked_softmax_fusion=false",)
    for job in set(ASPECTS.values()):
        assert look(job, 1, dead) == look(job, 1, ())


@pytest.mark.parametrize("key", SCHEDULES)
def test_every_number_of_a_schedule_comes_into_force(key):
    section, *inner = key.split(".")
    recipe = Recipe.load(shrunk.RECIPE)
    values = recipe.plugins if section == "plugins" else recipe.sections[section]
    for name in inner:
        values = values[name]
    course = course_of(values)
    for index, phase in enumerate(values):
        for field, value in phase.items():
            changed = [*values[:index], phase | {field: OTHER[type(value)](value)}, *values[index + 1 :]]
            assert course_of(changed) != course, f"{key}.{index}.{field}"


def course_of(phases):
    """A schedule's values over the whole run, at the report's batch of 15360 sequences of 4096 tokens."""
    batch, points = 15360 * 4096, range(0, 14_800_000_000_000, 5_000_000_000)
    schedule = Schedule.parse(phases)
    return [schedule.at(tokens // batch, tokens) for tokens in points]


@pytest.mark.parametrize("name", NEEDED)
def test_recipe_is_refused_without(name):
    from dsplugins.contracts import RecipeError
    from dsplugins.plan import prepare

    with pytest.raises(RecipeError, match=NEEDED[name]):
        prepare(Recipe.load(shrunk.RECIPE, [f"plugins.{name}=null"]))
