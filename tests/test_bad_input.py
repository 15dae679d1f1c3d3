"""Every fault of a recipe in one go, each with its place, key and remedy; nothing is started."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import forks
import pytest

from dsplugins.contracts import RecipeError
from dsplugins.plan import prepare
from dsplugins.recipe import Recipe, render

TINY = Path(__file__).parent / "tiny.yaml"


def problems_of(path, *overrides):
    with pytest.raises(RecipeError) as caught:
        prepare(Recipe.load(path, overrides))
    return caught.value.problems


def write(folder, text):
    file = folder / "mine.yaml"
    file.write_text(text)
    return file


def train(folder, *arguments):
    line = [sys.executable, "-m", "dsplugins", "train", *map(str, arguments)]
    return forks.run(line, cwd=folder)


def test_a_good_recipe_has_no_problems():
    plugins, plan = prepare(Recipe.load(TINY))
    assert plan.slots["router"] == "aux_free" and [item.name for item in plugins][0] == "gpt"


# What is wrong, said with which key, and what to do about it.
FAULTS = [
    # unknown keys, at any depth
    ("traim.steps=3", "traim is not a section", "did you mean train"),
    ("train.stepz=3", "train.stepz is not an option", "did you mean steps"),
    ("data.sub.deep=1", "data.sub is not an option", "known: seq_length"),
    ("plugins.aux_free.update_rat=1", "update_rat is not an option of aux_free", "did you mean update_rate"),
    (
        "model.hidden_sice=3",
        "model.hidden_sice is not an option of megatron",
        "did you mean hidden_size",
    ),
    ("optimizer.clip_grads=1", "optimizer.clip_grads is not an option", "did you mean clip_grad"),
    ("ddp.bucket_sice=1", "ddp.bucket_sice is not an option", "did you mean bucket_size"),
    # wrong types
    ("train.steps=many", "train.steps='many' is not a whole number", "Stop after"),
    ("train.steps=1.5", "train.steps=1.5 is not a whole number", "Stop after"),
    ("train.learning_rate=fast", "train.learning_rate", "Of AdamW"),
    ("train.learning_rate=[{until: 5 stepz, to: 1}]", "'5 stepz' is not a count", "Of AdamW"),
    ("train=3", "train is not a mapping", "write `KEY: VALUE` below `train:`"),
    ("plugins.aux_free=3", "neither a mapping of options nor null", "write `aux_free: {}`"),
    ("model.num_layers=x", "model.num_layers='x' is not a positive whole number", "without quotes"),
    ("nonsense", "'nonsense' is not KEY=VALUE", "train.steps=10"),
    # plugins and slots
    ("plugins.aux_fre={}", "plugins.aux_fre: no installed package offers", "did you mean aux_free"),
    ("plugins.zzzzzz={}", "plugins.zzzzzz: no installed package offers", "pip install PACKAGE"),
    ("plugins.gqa={}", "slot attention is filled twice: by mla and by gqa", "drop one: `mla: null`"),
    ("plugins.mla=null", "slot attention is empty", "name one under plugins: gqa, mla"),
    ("plugins.aux_free=null", "slot router is empty", "aux_free, aux_loss"),
    ("plugins.gqa=null", "plugins.gqa: null removes a plugin that no file names", "drop the line"),
    # out of range
    ("plugins.aux_free.update_rate=7", "update_rate=7 is out of range (0 to 1)", "how far a bias moves"),
    ("parallel.tensor=0", "parallel.tensor=0 is out of range", "tensor_model_parallel_size"),
    ("train.global_batch=0", "train.global_batch=0 is less than 1", "1 or more"),
    ("train.learning_rate=-1", "train.learning_rate=-1 is less than 0", "0 or more"),
    ("data.seq_length=0", "data.seq_length=0 is less than 1", "1 or more"),
    ("train.seed=-1", "train.seed=-1 is less than 0", "0 or more"),
    ("run.world_size=0", "run.world_size=0 is less than 1", "number of processes"),
    ("run.directory=''", "run.directory is empty", "name a folder"),
    ("train.tokens=1000", "one of them", "drop one"),
    # sizes that do not divide
    (
        "parallel.expert=3",
        "expert=3 does not divide model.num_moe_experts=8",
        "choose a divisor of 8",
    ),
    ("train.global_batch=[{to: 3}]", "train.global_batch", "Sequences a step"),
    # code and resolvers
    ("model._target_=os.system", "model._target_: a recipe is data and can't name code", "name a plugin"),
    ("plugins.aux_free._target_=x", "can't name code", "name a plugin"),
    (
        "run.directory=${oc.decode:x}",
        "the resolver oc.decode is not allowed",
        "under data and run",
    ),
    (
        "model.vocab_size=${oc.env:HOME}",
        "the resolver oc.env is not allowed",
        "under data and",
    ),
    ("train.steps=${no.where}", "train.steps: can't be resolved", "references look like"),
    ("run.directory=${oc.env:NO_SUCH_NAME}", "'NO_SUCH_NAME' not found", "set the variable"),
    ("plugins.aux_free={update_rate: 0, update_rate: 1}", "update_rate is given twice", "drop one"),
]


@pytest.mark.parametrize(("override", "said", "remedy"), FAULTS, ids=[fault[0] for fault in FAULTS])
def test_command_line_faults(override, said, remedy):
    problems = problems_of(TINY, override)
    hits = [p for p in problems if said in p.message]
    assert hits, [p.message for p in problems]
    assert remedy in hits[0].remedy and hits[0].place == "command line"


@pytest.mark.parametrize(
    ("override", "said", "line"),
    [
        ("parallel.pipeline=2", "run.world_size=1 is not a multiple of tensor x pipeline x context = 2", 38),
        (
            "train.micro_batch=3",
            "train.global_batch=8 is not a multiple of micro_batch x data parallel = 3",
            34,
        ),
    ],
)
def test_sizes_are_told_where_they_stand(override, said, line):
    hits = [p for p in problems_of(TINY, override) if p.message == said]
    assert hits and hits[0].place.endswith(f"tiny.yaml:{line}") and "multiple" in hits[0].remedy


def test_a_slot_that_only_this_model_needs():
    problems = problems_of(TINY, "plugins.mtp=null", "model.mtp_num_layers=1")
    assert [p.message for p in problems] == ["slot mtp is empty"]
    assert "name one under plugins: mtp" in problems[0].remedy


def test_one_section_that_is_wrong_does_not_hide_or_blame_another():
    said = [p.message for p in problems_of(TINY, "train.steps=many", "parallel.expert=3", "model.x=1")]
    assert any("parallel.expert=3 does not divide" in line for line in said)
    assert any("model.x is not an option" in line for line in said)
    said = [p.message for p in problems_of(TINY, "run.world_size=two", "parallel.expert=2")]
    assert said == ["run.world_size='two' is not a whole number"]
    said = [p.message for p in problems_of(TINY, "train.global_batch=${a:b}")]
    assert said == ["train.global_batch: the resolver a is not allowed here"]


ALL = f"""extends: [{TINY}]
plugins:
  aux_fre: {{}}
  gqa: {{}}
  python_source: {{max_byte: 3}}
parallel: {{expert: 3}}
traim: {{steps: 4}}
train:
  steps: no
  seed: 1
  seed: 2
model:
  hidden_sice: 3
  ffn_hidden_size: ${{eval:1}}
optimizer: {{_target_: os.system}}
"""
LINES = {
    3: "aux_fre",
    4: "filled twice",
    5: "max_byte",
    6: "parallel.expert=3",
    7: "traim",
    9: "train.steps",
    11: "given twice",
    13: "hidden_sice",
    14: "resolver eval",
    15: "_target_",
}


def test_all_problems_at_once_with_lines(tmp_path):
    file = write(tmp_path, ALL)
    problems = problems_of(file, "train.stepz=1")
    shown = render(problems)
    for line, word in LINES.items():
        assert any(f"mine.yaml:{line}:" in row and word in row for row in shown.splitlines()), shown
    assert "command line: train.stepz" in shown
    assert all(p.place and p.key and p.remedy for p in problems)
    assert shown.endswith("problems. Nothing was started.")


@pytest.mark.parametrize(
    ("content", "said", "line"),
    [
        (b"", "is empty", 1),
        (b"# nothing but words\n", "is empty", 1),
        (b"- a\n", "is not a mapping", 1),
        (b"train: {steps: 1}\na: [1\n", "is not YAML", 3),
        (b"train:\n\tsteps: 1\n", "is not YAML", 2),
        (b"train: {steps: 1}\n---\ntrain: {steps: 2}\n", "is not YAML", 2),
        (b"\x00\xff\x01", "is not a text file", 1),
        (b"train: {}\nextends: [nowhere.yaml]\n", "nowhere.yaml: there is no such file", 2),
        (b"extends: [mine.yaml]\n", "goes in a circle: mine.yaml -> mine.yaml", 1),
        (b"train: {steps: 1}\ntrain: {steps: 2}\n", "train is given twice, first at", 2),
        (b"train:\n  steps: !!python/name:os.system x\n", "recipes have no YAML tags", 2),
    ],
)
def test_broken_files(tmp_path, content, said, line):
    file = tmp_path / "mine.yaml"
    file.write_bytes(content)
    hits = [p for p in problems_of(file) if said in p.message]
    assert hits and hits[0].place.endswith(f"mine.yaml:{line}") and hits[0].remedy


def test_a_plugin_that_fails_to_import(tmp_path, monkeypatch):
    (tmp_path / "broken-1.0.dist-info").mkdir()
    metadata = {"METADATA": "Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n"}
    metadata["entry_points.txt"] = "[dsplugins.event]\nbroken = broken:Plugin\nno_class = fine:Plugin\n"
    for name, text in metadata.items():
        (tmp_path / "broken-1.0.dist-info" / name).write_text(text)
    (tmp_path / "broken.py").write_text("import no_such_library\n")
    (tmp_path / "fine.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    problems = problems_of(TINY, "plugins.broken={}", "plugins.no_class={}", "train.stepz=1")
    assert not any("is empty" in p.message for p in problems_of(TINY, "plugins.broken/broken={}"))
    said = [p.message for p in problems]
    lacks = "ModuleNotFoundError: No module named 'no_such_library'"
    assert f"plugins.broken: broken can't be imported: {lacks}" in said
    assert any(line.startswith("plugins.no_class: broken can't be imported: AttributeError") for line in said)
    assert all(p.place == "command line" and p.remedy for p in problems) and len(problems) == 3


def test_two_writers_are_both_named_with_everything_else(tmp_path):
    softmax = "model.moe_router_score_function=softmax"
    done = train(tmp_path, TINY, softmax, "parallel.expert=3", "model.hidden_sice=1", "run.directory=never")
    assert done.returncode == 3 and "Traceback" not in done.stderr
    two = "command line: model.moe_router_score_function has two writers: command line sets 'softmax', "
    assert two + "plugin aux_free sets 'sigmoid'\n    drop one of them" in done.stderr
    assert "parallel.expert=3 does not divide" in done.stderr and "did you mean hidden_size" in done.stderr
    assert done.stderr.endswith("4 problems. Nothing was started.\n")
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    ("overrides", "said", "remedy"),
    [
        # Without overlap both ends of a pipeline would wait for each other, or take each other's tensors.
        (["model.overlap_p2p_comm=false"], "model.overlap_p2p_comm has two writers", "drop one"),
        (
            ["parallel.virtual_pipeline=1"],
            "needs parallel.virtual_pipeline > 1",
            "name the schedule",
        ),
        (
            ["train.micro_batch=1", "train.global_batch=3", "evaluate.sequences=0"],
            "interleaved refuses train.global_batch: 3 micro",
            "change the batch",
        ),
        (["model.num_layers=3"], "does not divide model.num_layers=3", "pipeline_model_parallel_layout"),
        (["plugins.interleaved=null", "plugins.one_f_one_b={}"], "one_f_one_b has one chunk", "interleaved"),
        (["model.moe_router_topk=9"], "moe_router_topk=9 is more than model.num_moe_experts=8", "at most 8"),
        (
            ["model.moe_router_num_groups=3"],
            "(8) should be divisible by moe_router_num_groups",
            "change it",
        ),
        (["plugins.gpt.dense_layers=9"], "dense_layers=9 leaves none", "at most 3"),
        (["model.moe_ffn_hidden_size=0"], "model.moe_ffn_hidden_size=0 is less than 1", "1 or more"),
        (["model.kv_lora_rank=0"], "model.kv_lora_rank=0 is less than 1", "1 or more"),
        (["model.init_method_std=-1"], "model.init_method_std=-1 is not positive", "more than 0"),
        (
            ["model.hidden_size='64'"],
            "model.hidden_size='64' is not a positive whole number",
            "without quotes",
        ),
        (["model.hidden_size=null"], "model.hidden_size is missing", "positive whole number"),
        (["model.attention_output_gate=true"], "megatron-core refuses: Output gate", ""),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_layouts_and_sizes_that_megatron_refuses_or_breaks(overrides, said, remedy):
    from dsplugins.settings import settle

    layout = ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "run.world_size=2"]
    recipe = Recipe.load(TINY, [*layout, "plugins.one_f_one_b=null", "plugins.interleaved={}", *overrides])
    with pytest.raises(RecipeError) as caught:
        plugins, plan = prepare(recipe)
        settle(plan, plugins, recipe)
    hits = [p for p in caught.value.problems if said in p.message]
    assert hits, [p.message for p in caught.value.problems]
    assert remedy in hits[0].remedy and hits[0].place and hits[0].key


def test_what_this_machine_lacks_has_another_code(tmp_path):
    nowhere = f"plugins.python_source.directory={tmp_path}/nowhere"
    done = train(tmp_path, TINY, nowhere, "run.directory=out")
    assert done.returncode == 4 and "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("command line: ")]
    assert "/nowhere is not a folder" in line and "point plugins.python_source.directory to a folder" in line
    assert "starting" not in done.stderr and not (tmp_path / "out").exists()
    done = train(tmp_path, TINY, "plugins.cpu=null", "plugins.cuda={}", "run.directory=cuda")
    assert done.returncode == 4 and "Traceback" not in done.stderr
    assert "platform cuda needs 1 GPUs on this machine, torch sees 0: " in done.stderr.splitlines()[0]


def test_an_empty_slot_is_one_problem_whoever_requires_it():
    (problem,) = problems_of(TINY, "plugins.aux_free=null", "plugins.expert_load={}")
    assert problem.message == "slot router is empty" and "aux_free, aux_loss" in problem.remedy


def test_a_broken_router_is_one_problem_whoever_requires_one():
    """Neither an empty slot nor something that another plugin misses: it is named, and can't be had."""
    (problem,) = problems_of(TINY, "plugins.aux_free.update_rat=1", "plugins.expert_load={}")
    assert problem.key == "plugins.aux_free.update_rat"


def test_a_router_that_can_not_be_imported_is_one_problem(monkeypatch):
    from importlib.metadata import EntryPoint

    from dsplugins import manager
    from dsplugins.offers import Offer, offers

    gone = Offer("gone", "router", "gone", "1", EntryPoint("gone", "no_such_module:Gone", "dsplugins.router"))
    monkeypatch.setattr(manager, "offers", lambda: [*offers(), gone])
    (problem,) = problems_of(TINY, "plugins.aux_free=null", "plugins.gone={}", "plugins.expert_load={}")
    assert "gone can't be imported: ModuleNotFoundError" in problem.message


def test_a_misspelt_base_in_another_folder_is_found(tmp_path):
    file = write(tmp_path, "extends: [deepseek_v3/tiny_cpi.yaml]\n")
    assert problems_of(file)[0].remedy == "did you mean deepseek_v3/tiny_cpu.yaml?"


def test_a_shipped_recipe_without_its_folder_is_found():
    assert problems_of("tiny_cpu")[0].remedy == "did you mean deepseek_v3/tiny_cpu.yaml?"


def test_missing_corpora_are_all_named_before_a_process_is_started(tmp_path):
    corpora = "plugins.indexed={train: [a, b], validation: [c]}"
    done = train(tmp_path, TINY, "plugins.python_source=null", corpora, "run.directory=out")
    assert done.returncode == 4 and "starting" not in done.stderr
    lines = done.stderr.splitlines()
    assert [line.split(" is not there: ")[0] for line in lines] == [
        f"command line: {name}.bin" for name in "abc"
    ]
    assert all("dsplugins data build" in line for line in lines) and not (tmp_path / "out").exists()


def test_what_the_first_rank_has_told_is_not_said_twice(tmp_path):
    done = train(tmp_path, TINY, "model.moe_router_topk=9", "run.directory=out")
    said = "moe_router_topk=9 is more than model.num_moe_experts=8"
    assert done.returncode == 3 and done.stderr.startswith("starting 1 process")
    assert done.stderr.count(said) == 1 and "exit code" not in done.stderr
    status = json.loads((tmp_path / "out" / "status.json").read_text())
    assert status["code"] == 3 and said in status["reason"]


def test_a_cluster_s_recipe_starts_nothing_on_one_machine(tmp_path):
    for more in ([], ["plugins.cuda=null", "plugins.cpu={}", "plugins.te=null", "plugins.torch_local={}"]):
        done = train(tmp_path, "deepseek_v3/v3_671b.yaml", *more, "run.directory=out")
        assert done.returncode == 4 and "Traceback" not in done.stderr, done.stderr
        said = "2048 processes take 512 GiB" if more else "platform cuda needs 1 GPUs on this machine"
        assert said in done.stderr and "dsplugins launch" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "field",
    ["model.calculate_per_token_loss=true", "model.hidden_dropout=0.1", "model.attention_dropout=0.1"],
)
def test_what_would_be_wrong_without_a_word_is_refused_once(field):
    from dsplugins.settings import settle

    recipe = Recipe.load(TINY, [field])
    plugins, plan = prepare(recipe)
    with pytest.raises(RecipeError) as refused:
        settle(plan, plugins, recipe)
    (problem,) = refused.value.problems
    assert problem.key == field.partition("=")[0] and problem.place == "command line" and problem.remedy


def test_context_parallelism_is_refused_whatever_the_backend():
    with pytest.raises(RecipeError, match="parallel.context=2: the loop does not"):
        prepare(Recipe.load(TINY, ["parallel.context=2", "run.world_size=2"]))
