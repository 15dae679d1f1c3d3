"""`dsplugins check`: the 671B recipe to the last parameter, and every kind of fault, without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import forks
import pytest
from click.testing import CliRunner
from runs import SEQUENTIAL

ROOT = Path(__file__).parents[2]
TINY = "tests/tiny.yaml"
INTERLEAVED = ["plugins.one_f_one_b=null", "plugins.interleaved={}", "run.world_size=2"]
INTERLEAVED += ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]


def check(*arguments, code=0, **environment):
    """Standard output and error of the command as a user types it, without GPUs."""
    done = forks.run(
        [sys.executable, "-m", "dsplugins", "check", *arguments], ROOT, os.environ | environment, timeout=900
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done.stdout, done.stderr


# -- DeepSeek-V3 ----------------------------------------------------------------------------------

# Of one layer, from the published configuration (inference/configs/config_671B.json).
HIDDEN, VOCAB, EXPERTS = 7168, 129280, 256
MLA = HIDDEN * 1536 + 1536 + 1536 * 128 * 192 + HIDDEN * 576 + 512 + 512 * 128 * 256 + 128 * 128 * HIDDEN
NORMS, DENSE, EXPERT = 2 * HIDDEN, 3 * HIDDEN * 18432, 3 * HIDDEN * 2048
EMBEDDING = VOCAB * HIDDEN
MOE_LAYER = MLA + NORMS + EXPERTS * HIDDEN + EXPERT * (1 + EXPERTS // 64)
"""What one rank of 64 holds: gate, shared expert, 4 of 256 experts."""
MTP_OWN = 2 * HIDDEN * HIDDEN + 3 * HIDDEN


@pytest.fixture(scope="module")
def v3():
    return json.loads(check("recipes/deepseek_v3/v3_671b.yaml", "--json")[0])


@pytest.mark.parametrize(
    ("row", "trainable", "with_biases"),
    [
        ("model", 671_026_404_352, 671_026_419_200),
        ("model_and_mtp", 682_636_472_320, 682_636_487_424),
        ("mtp", 682_636_472_320 - 671_026_404_352, 11_610_068_224),
        ("activated_embedding_and_head", 37_552_297_472 - 58 * EXPERTS, 37_552_297_472),
        ("activated_head_only", 36_625_618_432 - 58 * EXPERTS, 36_625_618_432),
        ("activated_neither", 35_698_939_392 - 58 * EXPERTS, 35_698_939_392),
    ],
)
def test_v3_has_the_published_number_of_parameters(v3, row, trainable, with_biases):
    assert v3["counts"][row] == {"trainable": trainable, "with_correction_biases": with_biases}


def test_v3_keeps_a_token_in_as_many_bytes_as_published(v3):
    """61 x (512 + 64) numbers in BF16 (arXiv 2505.09343, table 1: 70.272 KB)."""
    assert v3["kv_cache_bytes"] == 70_272


def test_v3_takes_as_many_operations_a_token_as_published(v3):
    """arXiv 2505.09343, tables 2 and 4: 250 GFLOP; 385 TFLOP/s at 272.80B tokens a day on 2048 GPUs."""
    from dsplugins.cli.check import bill

    training = v3["training"]
    assert training["flops_a_token"] == pytest.approx(250e9, rel=2.5e-3)
    assert training["tokens"] == pytest.approx(14.8e12, rel=1e-5) and training["processes"] == 2048
    made = bill(training, 272.80e9 / 86400 / 2048, 2.0)
    assert made["tflops"] == pytest.approx(385, rel=4e-3)
    assert made["tflops_unmasked"] == pytest.approx(432, rel=4e-3)
    assert made["hours"] == pytest.approx(2664e3, rel=2e-3)
    assert made["dollars"] == pytest.approx(5.328e6, rel=2e-3)


def test_hours_and_price_are_told_at_a_speed():
    said, _ = check(TINY, "--tokens-per-second", "100", "--dollars", "0.5")
    assert "Training: 1,280 tokens in sequences of 32, " in said
    assert "At 100 tokens a second on each process (" in said and "): 13 s, " in said
    assert "0.00356 process-hours, 0.00178 dollars." in said
    found = json.loads(check(TINY, "--json", "--tokens-per-second", "100")[0])
    assert found["bill"]["seconds"] == 12.8 and found["bill"]["dollars"] is None
    assert "bill" not in json.loads(check(TINY, "--json")[0])


@pytest.mark.parametrize("given", ["0", "-1", "nan", "inf", "fast"])
def test_a_speed_is_a_number_above_0(given):
    from dsplugins.cli.check import command

    assert CliRunner().invoke(command, [TINY, "--tokens-per-second", given]).exit_code == 2
    done = CliRunner().invoke(command, [TINY, "--dollars", "2"])
    assert done.exit_code == 2 and "--dollars needs --tokens-per-second" in done.output


def test_each_stage_of_v3_holds_what_one_rank_should(v3):
    stages = v3["stages"]
    assert [stage["stage"] for stage in stages] == list(range(16))
    held = {stage["layers"]: stage["parameters"] for stage in stages}
    assert held["embedding, decoder.0-3"] == EMBEDDING + 3 * (MLA + NORMS + DENSE) + MOE_LAYER
    assert held["decoder.4-7"] == held["decoder.56-59"] == 4 * MOE_LAYER
    # The last stage: one layer, the final norm, MTP with its own norms, the head, and MTP's embedding.
    assert held["decoder.60, mtp.0, head"] == 2 * MOE_LAYER + HIDDEN + MTP_OWN + 2 * EMBEDDING
    assert [stage["embedding_copy"] for stage in stages] == [0] * 15 + [EMBEDDING]


def test_each_stage_of_v3_says_what_its_state_weighs(v3):
    """BF16 weights and moments, FP32 gradients and main weights; ZeRO over 128 ranks, for experts over 2."""
    row = next(stage for stage in v3["stages"] if stage["layers"] == "decoder.4-7")
    experts = 4 * 256 // 64 * 3 * HIDDEN * 2048
    share = (row["parameters"] - experts) / 128 + experts / 2
    state = row["state"]
    assert (state["weights"], state["gradients"]) == (2 * row["parameters"], 4 * row["parameters"])
    assert state["main_weights"] == pytest.approx(4 * share, abs=4 * 100)
    assert state["moments"] == pytest.approx(4 * share, abs=4 * 100)


def test_v3_is_built_as_2048_ranks_with_stand_ins_and_every_batch_is_looked_at(v3):
    layout = v3["layout"]
    assert (layout["world_size"], layout["data"], layout["expert_data"]) == (2048, 128, 2)
    assert v3["stand_ins"] == {"te": "torch_local"}
    # 3072 to 15360 sequences on 128 data-parallel ranks, one at a time.
    assert v3["micro_batches"] == list(range(24, 121))
    assert {problem["kind"] for problem in v3["problems"]} <= {"environment"}


# -- small recipes, in one child process ----------------------------------------------------------

MANY = """
import json, sys
from dsplugins.meta import answer
answers = [answer("tests/tiny.yaml", overrides) for overrides in json.load(sys.stdin)]

# Now spoilt: dense layers where experts were chosen, and a backend without a stand-in.
from dsplugins import model
from dsplugins.plugins.backend.te import TransformerEngine
experts, model._moe = model._moe, model._dense
answers.append(answer("tests/tiny.yaml", ["parallel.pipeline=2", "run.world_size=2"]))
model._moe = experts
del TransformerEngine.stand_in
answers.append(answer("tests/tiny.yaml", %s))
print("ANSWERS" + json.dumps(answers))
"""
TE = ["plugins.cpu=null", "plugins.cuda={}", "plugins.torch_local=null", "plugins.te={}"]
LAYOUTS = {
    "one": [],
    "expert": ["parallel.expert=2", "run.world_size=2"],
    "tensor": ["parallel.tensor=2", "parallel.pipeline=2", "parallel.expert=2", "run.world_size=8"],
    "expert tensor": [*SEQUENTIAL, "parallel.tensor=2", "parallel.expert_tensor=2", "run.world_size=4"],
    "interleaved": INTERLEAVED,
}
FAULTS = {
    # what is changed: the key that is told, and a part of what is said of it
    "topk": (["model.moe_router_topk=9"], "model.moe_router_topk", "more than model.num_moe_experts=8"),
    "refused by core": (
        ["model.cpu_offloading=true", "model.cpu_offloading_num_layers=9"],
        "model.cpu_offloading",
        "megatron-core refuses: CPU offloading can be done only for layers less than 4",
    ),
    "layout": (
        [
            "model.pipeline_model_parallel_layout=Et|tttL|m",
            "parallel.pipeline=2",
            "run.world_size=2",
        ],
        "model.pipeline_model_parallel_layout",
        "megatron-core refuses: pipeline_model_parallel_layout must be divisible",
    ),
    "interleaved": (
        [
            *INTERLEAVED,
            "train.micro_batch=1",
            "train.global_batch=[{until: 3 steps, from: 1, to: 7}, {value: 7}]",
        ],
        "train.global_batch",
        "7 micro-batch counts a step, 1-7, of which interleaved refuses 4: 1, 3, 5, 7",
    ),
    "ignored": (
        [*SEQUENTIAL, "model.moe_grouped_gemm=true"],
        "model.moe_grouped_gemm",
        "has no effect: sequential decides in the slot experts",
    ),
    "a pattern": (
        ["plugins.adamw.no_decay=[vectors,'*router.wieght']"],
        "plugins.adamw.no_decay",
        "no parameter is named like '*router.wieght'",
    ),
}


@pytest.fixture(scope="module")
def answers():
    requests = {**LAYOUTS, **{name: overrides for name, (overrides, _, _) in FAULTS.items()}}
    requests["interleaved batches"], requests["interleaved"] = requests["interleaved"], INTERLEAVED
    # torch_local would write the first of these itself, and can't do the second.
    requests["te"] = [*TE, "model.persist_layer_norm=true"]
    requests["te alone"] = [*TE, "model.layernorm_zero_centered_gamma=true"]
    done = subprocess.run(
        [sys.executable, "-c", MANY % json.dumps(TE)],
        input=json.dumps(list(requests.values())),
        capture_output=True,
        text=True,
        timeout=900,
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"},
    )
    assert done.returncode == 0, done.stderr
    names = [*requests, "spoilt", "without stand-in"]
    return dict(zip(names, json.loads(done.stdout.split("ANSWERS")[1]), strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_has_as_many_parameters_in_every_layout(answers, layout):
    assert answers[layout]["problems"] == []
    assert answers[layout]["built"]["counts"] == answers["one"]["built"]["counts"]


def counted_in_a_run(*overrides):
    from built import tiny_model

    from dsplugins import counts

    with tiny_model(*overrides) as (_, settings, _, chunks):
        total = counts.of_model(chunks)
        return total.rows(counts.share(settings.model)), counts.parameters(settings.model, chunks)


@pytest.mark.parametrize("overrides", [["parallel.expert=2"], ["parallel.tensor=2"], INTERLEAVED])
def test_a_run_counts_what_check_counts(answers, workers, overrides):
    rows = answers["one"]["built"]["counts"]
    both = rows["model_and_mtp"]["trainable"]
    activated = rows["activated_embedding_and_head"]["trainable"] + rows["mtp_activated"]["trainable"]
    for seen in workers(2).run(counted_in_a_run, *overrides):
        assert seen == (rows, (both, activated))


def test_chunks_are_told_apart_and_the_copy_of_the_embedding_is_shown(answers):
    stages = answers["interleaved"]["built"]["stages"]
    assert [(row["stage"], row["chunk"]) for row in stages] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    layers = ["embedding, decoder.0", "decoder.2", "decoder.1", "decoder.3, mtp.0, head"]
    assert [row["layers"] for row in stages] == layers
    assert [row["embedding_copy"] for row in stages] == [0, 0, 0, 264 * 32]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_with_place_key_and_remedy(answers, fault):
    _, key, said = FAULTS[fault]
    answer = answers["interleaved batches" if fault == "interleaved" else fault]
    assert answer["built"] is None
    (problem,) = [problem for problem in answer["problems"] if problem["key"] == key]
    assert said in problem["message"] and problem["place"] == "command line" and problem["remedy"]


def test_allowed_micro_batches_are_listed(answers):
    (problem,) = answers["interleaved batches"]["problems"]
    assert problem["remedy"].startswith("interleaved allows 2, 4, 6")


def test_what_was_built_is_audited_over_all_stages(answers):
    assert answers["spoilt"]["built"] is None
    messages = [problem["message"] for problem in answers["spoilt"]["problems"]]
    assert (
        "what is built is not what was chosen: decoder.1-3, mtp.0: mlp is MLP, chosen was experts" in messages
    )


def test_a_stand_in_has_its_way_without_blaming_the_recipe(answers):
    assert answers["te"]["built"]["stand_ins"] == {"te": "torch_local"}
    assert answers["te"]["built"]["counts"] == answers["one"]["built"]["counts"]
    assert {problem["kind"] for problem in answers["te"]["problems"]} <= {"environment"}


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (
            "te alone",
            "can't be built with torch_local in the place of te: model.layernorm_zero_centered_gamma",
        ),
        ("without stand-in", "can't be built here: the backend te needs TransformerEngine"),
    ],
)
def test_what_cannot_be_built_without_a_library_is_the_environments_fault(answers, case, said):
    if case == "without stand-in" and importlib.util.find_spec("transformer_engine"):
        pytest.skip("TransformerEngine is installed here")
    assert answers[case]["built"] is None
    assert {problem["kind"] for problem in answers[case]["problems"]} == {"environment"}
    assert any(said in problem["message"] for problem in answers[case]["problems"])


# -- the command ----------------------------------------------------------------------------------


def test_text_shows_stages_and_counts_and_here_adds_the_machine():
    arguments = [TINY, "plugins.cpu=null", "plugins.cuda={}", "plugins.fp32=null", "plugins.bf16={}"]
    arguments += ["plugins.alltoall=null", "plugins.deepep={}", "parallel.expert=2", "run.world_size=2"]
    shown, told = check(*arguments, "--here", code=4)
    assert "layout: 2 processes, data parallel 2, expert 2" in shown
    assert "stand-in: built with alltoall in the place of deepep, which a run uses" in shown
    assert "embedding, decoder.0-3, mtp.0, head" in shown and "with correction biases" in shown
    assert "megatron-core" in shown
    assert "platform cuda needs 1 GPUs on this machine, torch sees 0" in told
    if importlib.util.find_spec("deep_ep") is None:
        assert "plugins.deepep: needs the package deep_ep, which isn't installed here" in told


def test_problems_of_text_and_sizes_are_told_at_once_as_json():
    shown, _ = check(
        TINY, "train.learning_rate=-1", "train.global_batch=[{until: 3 steps, value: 3}, {value: 8}]",
        "run.world_size=2", "init_from.path=somewhere", "--json", code=3,
    )  # fmt: skip
    keys = {problem["key"] for problem in json.loads(shown)["problems"]}
    assert {"train.learning_rate", "train.global_batch"} <= keys
    assert any(key.startswith("init_from") for key in keys)


def test_a_crash_of_the_child_is_told_as_one(monkeypatch):
    from dsplugins.cli import check as command
    from dsplugins.cli import child

    started = child.start
    monkeypatch.setattr(
        child, "start", lambda module, request, **options: started("dsplugins.absent", request)
    )
    done = CliRunner().invoke(command.command, [str(ROOT / TINY)])
    assert done.exit_code == 1
    assert "the child process dsplugins.absent ended with code 1" in done.output
    assert "No module named dsplugins.absent" in done.output
