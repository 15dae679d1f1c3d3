"""Steps, evaluations and ends of runs, as the host makes them."""

import json
import struct
from types import SimpleNamespace

import pytest

from dsplugins.contracts import Evaluation, RunEnd, Step


@pytest.fixture
def make_step():
    """`make_step(n, counts=None, layers=None)`."""

    def make(number, counts=None, layers=(), **changes):
        values = dict(
            step=number,
            tokens=100 * number,
            loss=5.0 / number,
            mtp_loss=None,
            aux_loss=None,
            grad_norm=1.0,
            learning_rate=1e-3,
            global_batch=8,
            scheduled={},
            expert_counts=counts,
            router_layers=tuple(layers),
            max_vio=None,
            seconds=0.5,
            skipped=False,
        )
        return Step(**values | changes)

    return make


@pytest.fixture
def make_end(tmp_path):
    """`make_end(evaluation=None, baselines=None)`: the run directory is `tmp_path`."""

    def make(evaluation=None, baselines=None):
        return RunEnd(
            plan=None,
            directory=tmp_path,
            steps=10,
            evaluation=evaluation,
            baselines=baselines or {},
            completion=None,
        )

    return make


@pytest.fixture
def make_evaluation():
    """`make_evaluation(step, loss)`."""
    return lambda step, loss, **more: Evaluation(
        **dict(step=step, loss=loss, mtp_loss=None, mtp_acceptance=None, sequences=4) | more
    )


@pytest.fixture
def write_metrics(tmp_path):
    """`write_metrics(rows)`: `metrics.jsonl` of the run."""

    def write(rows, tail=""):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "metrics.jsonl").write_text(text + tail)

    return write


@pytest.fixture
def without(monkeypatch):
    """`without("matplotlib")`: as if it were not installed."""
    import sys

    return lambda name: monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture
def moe_settings():
    """Settings of a model with experts."""
    return SimpleNamespace(model=SimpleNamespace(num_moe_experts=8))


@pytest.fixture
def check_png():
    """`check_png(path)`: a whole PNG of a sensible size with more than one colour; its (width, height)."""

    def check(path):
        import matplotlib.image

        with open(path, "rb") as file:
            head = file.read(24)
        assert head[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", head[16:24])
        assert 400 <= width <= 1400 and 150 <= height <= 2000
        pixels = matplotlib.image.imread(path)  # decodes, so a cut file would raise
        assert pixels.shape[:2] == (height, width) and pixels.std() > 0.01
        return width, height

    return check
