"""A stand-in is a plugin of the same slot, and only `check` asks for it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dsplugins.contracts import RecipeError
from dsplugins.manager import Plugins, make
from dsplugins.offers import offers
from dsplugins.stand_ins import substitute


def chosen(*names):
    return [make(offer, {}, []) for offer in offers() if offer.name in names]


def test_only_plugins_that_name_one_are_replaced_in_their_slot():
    plugins = Plugins(chosen("te", "cuda", "fp32"))
    replaced, substitutes = substitute(plugins)
    assert substitutes == {"te": "torch_local"} and replaced.stand_ins == {"torch_local"}
    assert replaced.slots == plugins.slots | {"backend": "torch_local"}
    assert not plugins.stand_ins


@pytest.mark.parametrize("name", ["absent", "fp32"])
def test_a_stand_in_that_is_no_plugin_of_the_slot_is_its_authors_fault(name):
    (item,) = chosen("te")
    wrong = type("Wrong", (type(item.plugin),), {"stand_in": name})
    with pytest.raises(RecipeError, match=f"stand_in '{name}' is not a plugin of the slot backend"):
        substitute(Plugins([replace(item, plugin=wrong())]))
