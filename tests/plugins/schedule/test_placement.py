"""A schedule of another package owns where layers stand, how they run and what becomes of their gradients."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

HERE = Path(__file__).parent
V = [
    "parallel.pipeline=2",
    "parallel.virtual_pipeline=2",
    "plugins.one_f_one_b=null",
    "plugins.v_shape={}",
]
TEXT = "Ett|ttm|L"
LIST = "[[embedding, decoder, decoder], [decoder, decoder, mtp], [loss]]"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder in which a package that offers `v_shape` is installed."""
    folder = tmp_path_factory.mktemp("site")
    information = folder / "v_shape-1.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: v-shape\nVersion: 1\n")
    (information / "entry_points.txt").write_text("[dsplugins.schedule]\nv_shape = v_shape:VShape\n")
    return str(folder)


@contextmanager
def seen(folder):
    sys.path[:0] = [folder, str(HERE)]
    try:
        yield
    finally:
        del sys.path[:2]


def trained_in_v(folder, overrides):
    from runs import assembled, trained

    from dsplugins.audit.stages import names

    with seen(folder):
        with assembled(overrides) as run:
            stand = names(run.settings.model, run.chunks)
        return trained(overrides) | {"stand": stand}


def trained(overrides):
    from runs import trained

    return trained(overrides)


@pytest.fixture(scope="module")
def alone(workers):
    return workers(1).run(trained, [])[0]


def same(result, one):
    assert result["counts"] == one["counts"]
    for row, expected in zip(result["rows"], one["rows"], strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], abs=1e-6)
        assert row["mtp_loss"] == pytest.approx(expected["mtp_loss"], abs=1e-6)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    assert result["evaluation"]["loss"] == pytest.approx(one["evaluation"]["loss"], abs=1e-5)
    assert result["evaluation"]["mtp_acceptance"] == pytest.approx(one["evaluation"]["mtp_acceptance"])


def test_a_v_trains_as_one_process(workers, alone, installed):
    """Embedding, head and MTP on the first rank, layers down and up again."""
    results = workers(2).run(trained_in_v, installed, V)
    assert results[0]["stand"] == ["decoder.0", "decoder.3", "mtp.0", "decoder.final_layernorm"]
    assert results[1]["stand"] == ["decoder.1", "decoder.2"]
    for result in results:
        same(result, alone)


@pytest.mark.parametrize("layout", [TEXT, LIST])
def test_mtp_stands_before_the_last_stage(workers, alone, layout):
    """Its copy of the embedding learns with the first stage's, though the last one has none."""
    placed = ["parallel.pipeline=3", f"model.pipeline_model_parallel_layout={layout}"]
    for result in workers(3).run(trained, placed):
        same(result, alone)
