"""What a run shows first."""

from __future__ import annotations

from types import SimpleNamespace

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


def test_fewer_sequences_than_asked_for_are_told():
    assert sequences(64, 64) == "64 sequences"
    assert sequences(48, 64) == "48 sequences of 64 asked for"
