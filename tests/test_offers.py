"""Which plugin a name means, whatever else is installed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from dsplugins.offers import NoOffer, Offer, qualified, resolve


def offer(name, slot, distribution):
    return Offer(name, slot, distribution, "1", SimpleNamespace(value="x:X"))


OURS = offer("aux_free", "router", "dsplugins")
THEIRS = offer("aux_free", "event", "My.Plugins")
ONE, OTHER = offer("fair", "router", "one"), offer("fair", "router", "other")
TWICE = [offer("both", "router", "one"), offer("both", "event", "one")]
ALL = [OURS, THEIRS, ONE, OTHER, *TWICE]


def test_what_is_installed_beside_does_not_change_a_recipe():
    assert resolve("aux_free", ALL) is OURS and resolve("aux_free", [OURS]) is OURS


def test_a_distribution_before_the_name_means_its_own():
    assert qualified(THEIRS) == "my-plugins/aux_free"
    found = resolve("my-plugins/aux_free", ALL)
    assert (found.slot, found.distribution, found.name) == ("event", "My.Plugins", "my-plugins/aux_free")
    assert (
        resolve("dsplugins/aux_free", ALL).slot == "router" and resolve("one/fair", ALL).distribution == "one"
    )


@pytest.mark.parametrize(
    ("name", "said", "remedy"),
    [
        ("fair", "offered 2 times: one (router), other (router)", "write one/fair or other/fair"),
        ("both", "offered 2 times: one (router), one (event)", "uninstall all of them but one"),
        ("aux_fre", "no installed package offers", "did you mean aux_free?"),
        ("one/aux_free", "no installed package offers", "pip install PACKAGE"),
    ],
)
def test_what_can_not_be_told_apart_is_refused(name, said, remedy):
    with pytest.raises(NoOffer) as refused:
        resolve(name, ALL)
    assert said in str(refused.value) and remedy in refused.value.remedy


def test_both_stand_in_one_recipe(tmp_path, monkeypatch):
    from pathlib import Path

    from dsplugins.plan import prepare
    from dsplugins.recipe import Recipe

    information = tmp_path / "my_plugins-1.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: my-plugins\nVersion: 1\n")
    (information / "entry_points.txt").write_text("[dsplugins.event]\naux_free = namesake:Namesake\n")
    (tmp_path / "namesake.py").write_text(
        "from dsplugins.hookspecs import hookimpl\n"
        "class Namesake:\n"
        "    @hookimpl\n"
        "    def ds_step_end(self, step): return {}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / "both.yaml"
    tiny = Path(__file__).parent / "tiny.yaml"
    file.write_text(f"extends: [{tiny}]\nplugins:\n  my-plugins/aux_free: {{}}\n")
    plugins, plan = prepare(Recipe.load(file))
    assert plan.slots["router"] == "aux_free" and "my-plugins/aux_free" in plan.plugins
    assert [row["class"] for row in plugins.lock() if row["name"] == "my-plugins/aux_free"] == [
        "namesake:Namesake"
    ]
    plugins, plan = prepare(Recipe.load(tiny, ["plugins.my-plugins/aux_free={}"]))
    assert "my-plugins/aux_free" in plan.plugins
