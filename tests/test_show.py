"""What a run shows first."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from dsplugins.contracts import Layout
from dsplugins.plugins.precision.fp8_v3 import Fp8V3, Fp8V3Options
from dsplugins.show import Display, sequences


def test_a_plugin_tells_what_it_stands_for(capsys):
    """The backend that multiplies, where the slot's owner has several."""
    offer = SimpleNamespace(distribution="dsplugins", version="0.1.0")
    owners = {"precision": ("fp8_v3", Fp8V3(Fp8V3Options(backend="deepgemm"))), "mtp": ("mtp", object())}
    items = [
        SimpleNamespace(slot=slot, name=name, plugin=plugin, offer=offer)
        for slot, (name, plugin) in owners.items()
    ]
    Display(speaks=True).opening(SimpleNamespace(name="r", layout=Layout()), items, {})
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["precision", "fp8_v3", "(backend", "deepgemm)", "dsplugins", "0.1.0"] in rows
    assert ["mtp", "mtp", "dsplugins", "0.1.0"] in rows


def step(number):
    more = {"mtp_loss": None, "max_vio": None, "skipped": False}
    return SimpleNamespace(
        step=number, tokens=64 * number, loss=2.5, grad_norm=1.0, learning_rate=1e-3, **more
    )


@pytest.mark.parametrize(("total", "last"), [(5, "3/5"), (0, "3/?")])
def test_a_bar_on_a_terminal(total, last):
    display, written = Display(speaks=True), io.StringIO()
    display.console = Console(force_terminal=True, file=written, width=100, color_system=None)
    display.bar(total)
    for number in (1, 2, 3):
        display.step(step(number), {"tokens_per_second": 9.0}, logged=number == 2)
    display.stop_bar()
    display.say("the end")
    drawn = written.getvalue()
    lines = [re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]|\r", "", line) for line in drawn.splitlines()]
    assert "step 2  tokens 128  loss 2.50000  grad_norm 1.0000  lr 1.000e-03  tokens/s 9" in lines
    assert last in drawn and "step 3  tokens" not in drawn
    assert "\x1b[2K" in drawn[drawn.rindex(last) :], "the bar is taken away"
    assert lines[-1] == "the end"


@pytest.mark.parametrize(("speaks", "terminal"), [(True, False), (False, True)])
def test_no_bar_elsewhere(speaks, terminal):
    display, written = Display(speaks=speaks), io.StringIO()
    display.console = Console(force_terminal=terminal, file=written, quiet=not speaks)
    display.bar(5)
    display.step(step(1), {}, logged=False)
    display.stop_bar()
    assert written.getvalue() == ""


def test_fewer_sequences_than_asked_for_are_told():
    assert sequences(64, 64) == "64 sequences"
    assert sequences(48, 64) == "48 sequences of 64 asked for"
