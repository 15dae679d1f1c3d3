"""Same numbers in every layout, fp32, one seed, five steps."""

from __future__ import annotations

from typing import Any

import pytest
from runs import SEQUENTIAL

INTERLEAVED = ["parallel.virtual_pipeline=2", "plugins.one_f_one_b=null", "plugins.interleaved={}"]
TWOS = ["train.micro_batch=2"]
"""Half of the recipe's: two micro-batches a rank, or enough of them for a steady state of the pipeline."""
LAYOUTS = {
    "dp2": (2, TWOS),
    "tp2": (2, ["parallel.tensor=2"]),
    "ep2": (2, ["parallel.expert=2", *TWOS]),
    "pp2": (2, ["parallel.pipeline=2", *TWOS]),
    "pp2_vpp2": (2, ["parallel.pipeline=2", *INTERLEAVED, *TWOS]),
    "ep2_pp2": (4, ["parallel.expert=2", "parallel.pipeline=2", *TWOS]),
    "tp2_pp2": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
}
ALPHAS = {"report": "1.0e-4", "large": "0.5"}
ROUTERS = ("decoder.1", "decoder.2", "decoder.3", "mtp.0")


def trained_watched(overrides: list[str]) -> dict[str, Any]:
    """A run, and how many tokens stood near a tie in it."""
    from runs import trained
    from ties import watched

    with watched() as ties:
        return trained(overrides) | {"ties": ties}


@pytest.fixture(scope="module")
def alone(workers):
    return {
        name: workers(1).run(trained_watched, [f"plugins.aux_free.sequence_loss={alpha}"])[0]
        for name, alpha in ALPHAS.items()
    }


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(workers, alone, layout, alpha):
    """As long as all integer counts agree; where they part, it must be at a near-tie of two scores."""
    from ties import steps_alike

    size, overrides = LAYOUTS[layout]
    changes = [*overrides, f"plugins.aux_free.sequence_loss={ALPHAS[alpha]}"]
    one, results = alone[alpha], workers(size).run(trained_watched, changes)
    ties = [result["ties"] for result in results]
    for result in results:
        alike = steps_alike(result["counts"], one["counts"], ties, ROUTERS)
        assert alike, "the first step sees the same weights and the same tokens"
        for row, expected in list(zip(result["rows"], one["rows"], strict=True))[:alike]:
            same(row, expected)
        if alike == len(one["rows"]):
            found, expected = result["evaluation"], one["evaluation"]
            assert found["loss"] == pytest.approx(expected["loss"], abs=1e-5)
            assert found["mtp_acceptance"] == pytest.approx(expected["mtp_acceptance"])


def same(row: dict[str, Any], one: dict[str, Any]) -> None:
    assert row["loss"] == pytest.approx(one["loss"], abs=1e-6)
    assert row["mtp_loss"] == pytest.approx(one["mtp_loss"], abs=1e-6)
    assert row["aux_loss"] == pytest.approx(one["aux_loss"], rel=1e-6)
    assert row["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)


def test_a_step_learns_and_counts(alone):
    rows = alone["report"]["rows"]
    assert rows[-1]["loss"] < rows[0]["loss"]
    layers = alone["report"]["counts"][0]
    assert len(layers) == 4, "three decoder layers with experts, and MTP's"
    assert all(sum(layer) == 8 * 32 * 2 for layer in layers), (
        "every token counted once for each of its experts"
    )
    assert alone["report"]["ties"].keys() == set(ROUTERS)


def test_alpha_is_seen(alone):
    """1e-4 would hide a scaling error: at 0.5 the balance loss moves gradients by far more than 1e-5."""
    report, large = (alone[name]["rows"][0] for name in ("report", "large"))
    assert large["aux_loss"] == pytest.approx(5000 * report["aux_loss"], rel=1e-5)
    assert abs(large["grad_norm"] / report["grad_norm"] - 1) > 1e-2


@pytest.mark.parametrize(("size", "layout"), [(1, []), *(LAYOUTS[name] for name in ("ep2", "tp2", "pp2"))])
def test_sequential_experts_train_as_grouped_ones(workers, alone, size, layout):
    sequential = workers(size).run(trained_watched, [*SEQUENTIAL, *layout])[0]
    for row, one in zip(sequential["rows"], alone["report"]["rows"], strict=True):
        same(row, one)
    assert sequential["counts"] == alone["report"]["counts"]


GQA = [
    "plugins.mla=null",
    "plugins.gqa={}",
    "model.num_query_groups=2",
    "model.kv_channels=16",
    "train.steps=2",
]


@pytest.fixture(scope="module")
def grouped_queries(workers):
    return workers(1).run(trained_watched, GQA)[0]


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_another_attention_is_the_same_in_every_layout(workers, grouped_queries, layout):
    size, overrides = LAYOUTS[layout]
    for result in workers(size).run(trained_watched, [*GQA, *overrides]):
        for row, one in zip(result["rows"], grouped_queries["rows"], strict=True):
            same(row, one)


def test_what_a_dense_model_does_not_have_is_null(workers):
    """No experts, no MTP, no schedule for either."""
    from audit.provoke import DENSE

    (row,) = workers(1).run(trained_watched, [*DENSE, "plugins.mtp=null", "train.steps=1"])[0]["rows"]
    nothing = {key for key, value in row.items() if value is None}
    assert nothing == {"mtp_loss", "aux_loss", "bias_update_rate", "mtp_weight", "max_vio"}


# -- what explains a difference of counts ----------------------------------------------------------


def test_margins_are_how_far_a_choice_is_from_another():
    """Top-2 of 4: by the gap of experts, or by that of groups of two of which one is kept."""
    import torch
    from ties import margins

    choice = torch.tensor([[0.9, 0.5, 0.4, 0.1], [0.9, 0.1, 0.2, 0.7]])
    assert margins(choice, 2, None, None).tolist() == pytest.approx([0.1, 0.5])
    assert margins(choice, 1, None, None).tolist() == pytest.approx([0.4, 0.2])
    assert margins(choice, 2, 2, 1).tolist()[0] == pytest.approx(0.9)  # 1.4 against 0.5
    assert margins(choice, 1, 2, 1).tolist() == pytest.approx([0.4, 0.2])


def test_only_a_near_tie_explains_a_difference():
    from ties import steps_alike

    same, moved = [[8, 8], [4, 12]], [[8, 8], [5, 11]]
    names = ("decoder.1", "decoder.2")
    assert steps_alike([same, same], [same, same], [], names) == 2
    near = [{"decoder.2": [0, 1]}, {"decoder.1": [0, 0]}]
    assert steps_alike([same, moved], [same, same], near, names) == 1
    far = [{"decoder.1": [9, 9], "decoder.2": [1, 0]}]
    with pytest.raises(AssertionError, match="step 2, decoder.2: 1 moved, 0 stood near a tie"):
        steps_alike([same, moved], [same, same], far, names)


def flipped(gap: float) -> tuple[list[int], list[int], int]:
    """Counts of two routers whose affinities differ by 1e-6, and tokens near a tie in one of them."""
    import torch
    from oracles.tiny_moe import moe_config, router
    from ties import watched

    from dsplugins.plugins.router.aux_free import AuxFree, AuxFreeOptions

    changes = {"moe_router_num_groups": None, "moe_router_group_topk": None}
    with watched() as ties:
        built = router(AuxFree(AuxFreeOptions()), moe_config(**changes))
        built.set_layer_number(2)
        scores = torch.linspace(0.1, 0.9, 16).repeat(5, 1)
        scores[0, 11] = scores[0, 12] - gap  # the fourth and the fifth of the first token
        other = scores.clone()
        other[0, 11] += 1e-6
        counts = [built.choose(each)[1].sum(0).tolist() for each in (scores, other)]
    return counts[0], counts[1], ties["decoder.1"][0]


def test_a_real_near_tie_is_counted(single):
    first, second, near = flipped(5e-7)
    assert first != second and near == 2
    first, second, near = flipped(1e-3)
    assert first == second and near == 0
