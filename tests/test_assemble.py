"""What is told when the model can't be built."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

TINY = Path(__file__).parent / "tiny.yaml"


def test_an_error_of_core_names_the_parts_of_other_packages(single, monkeypatch):
    from dsplugins import assemble
    from dsplugins.cli.exits import reason_of
    from dsplugins.plan import prepare
    from dsplugins.recipe import Recipe

    def build(*_):
        raise AttributeError("'Linear' object has no attribute 'set_layer_number'")

    monkeypatch.setattr(assemble.model, "build", build)
    plugins, _ = prepare(Recipe.load(TINY, []))
    with pytest.raises(AttributeError) as alone:
        assemble._built(None, None, plugins, None)
    assert plugins.guests() == [] and reason_of(alone.value).endswith("'set_layer_number'")
    router = plugins.owner("router")
    guest = replace(router, offer=replace(router.offer, distribution="mine", version="0.1"))
    plugins.chosen = tuple(guest if one is router else one for one in plugins.chosen)
    with pytest.raises(AttributeError) as named:
        assemble._built(None, None, plugins, None)
    said = "(while the model was built, with parts by router aux_free (mine 0.1))"
    assert reason_of(named.value).endswith(said)
