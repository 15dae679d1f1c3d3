"""The chain between backward and optimizer: its order, and what a refused step leaves alone."""

import pytest

from dsplugins.finalize import GradientChain


@pytest.mark.parametrize("accepted", [True, False])
def test_biases_move_after_gradients_are_final_and_only_where_they_are_accepted(accepted):
    seen = []
    chain = GradientChain(lambda *_: seen.append("final"), seen.append, lambda: accepted)
    chain()
    assert seen == ["final", accepted] and chain.accepted is accepted


def test_without_a_condition_every_step_counts():
    seen = []
    GradientChain(lambda *_: None, seen.append)()
    assert seen == [True]
