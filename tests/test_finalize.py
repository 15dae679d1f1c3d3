"""The chain between backward and optimizer: its order, and what a refused step leaves alone."""

import pytest

from dsplugins.finalize import GradientChain


@pytest.mark.parametrize("accepted", [True, False])
def test_biases_move_after_gradients_are_final_and_only_where_they_are_accepted(accepted):
    seen = []
    chain = GradientChain(lambda *_: seen.append("final"), seen.append, lambda: accepted)
    chain()
    assert seen == ["final", accepted] and chain.accepted is accepted


def test_what_a_run_shows_of_it():
    from dsplugins.routers import Balance

    def core_finalizes(*_): ...

    def shown(names, routers):
        balance = object.__new__(Balance)
        balance.names, balance.routers = names, routers
        return str(GradientChain(core_finalizes, balance))

    moving, still = type("Moving", (), {"update_bias": None})(), object()
    assert shown([], []) == "core_finalizes"
    assert shown(["decoder.1"], [("decoder.1", still)]) == "core_finalizes -> router counts"
    moved = "core_finalizes -> router counts and bias update"
    assert shown(["decoder.1"], [("decoder.1", moving)]) == moved


def test_without_a_condition_every_step_counts():
    seen = []
    GradientChain(lambda *_: None, seen.append)()
    assert seen == [True]
