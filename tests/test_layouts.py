"""Same numbers in every layout, fp32, one seed, five steps."""

from __future__ import annotations

import pytest
from runs import trained

INTERLEAVED = ["parallel.virtual_pipeline=2", "plugins.one_f_one_b=null", "plugins.interleaved={}"]
LAYOUTS = {
    "dp2": (2, []),
    "tp2": (2, ["parallel.tensor=2"]),
    "ep2": (2, ["parallel.expert=2"]),
    "pp2": (2, ["parallel.pipeline=2"]),
    "pp2_vpp2": (2, ["parallel.pipeline=2", *INTERLEAVED]),
    "ep2_pp2": (4, ["parallel.expert=2", "parallel.pipeline=2"]),
    "tp2_pp2": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
}
ALPHAS = {"report": "1.0e-4", "large": "0.5"}


@pytest.fixture(scope="module")
def alone(workers):
    return {
        name: workers(1).run(trained, [f"plugins.aux_free.sequence_loss={alpha}"])[0]
        for name, alpha in ALPHAS.items()
    }


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(workers, alone, layout, alpha):
    size, overrides = LAYOUTS[layout]
    results = workers(size).run(trained, [*overrides, f"plugins.aux_free.sequence_loss={ALPHAS[alpha]}"])
    for result in results:
        assert result["counts"] == alone[alpha]["counts"]
        for row, one in zip(result["rows"], alone[alpha]["rows"], strict=True):
            assert row["loss"] == pytest.approx(one["loss"], abs=1e-6)
            assert row["mtp_loss"] == pytest.approx(one["mtp_loss"], abs=2e-6)
            assert row["aux_loss"] == pytest.approx(one["aux_loss"], rel=1e-5)
            assert row["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
        found, expected = result["evaluation"], alone[alpha]["evaluation"]
        assert found["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        assert found["mtp_acceptance"] == pytest.approx(expected["mtp_acceptance"])


def test_a_step_learns_and_counts(alone):
    rows = alone["report"]["rows"]
    assert rows[-1]["loss"] < rows[0]["loss"]
    layers = alone["report"]["counts"][0]
    assert len(layers) == 4, "three decoder layers with experts, and MTP's"
    assert all(sum(layer) == 8 * 32 * 2 for layer in layers), (
        "every token counted once for each of its experts"
    )


def test_grouped_experts_train_as_sequential_ones(workers, alone):
    swapped = ["plugins.sequential=null", "plugins.grouped={}"]
    grouped = workers(1).run(trained, swapped)[0]
    for row, one in zip(grouped["rows"], alone["report"]["rows"], strict=True):
        assert row["loss"] == pytest.approx(one["loss"], abs=1e-6)
    assert grouped["counts"] == alone["report"]["counts"]
