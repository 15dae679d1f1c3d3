"""The chain between backward and optimizer: its order, and what a refused step leaves alone."""

import pytest

from dsplugins.finalize import GradientChain


@pytest.mark.parametrize("accepted", [True, False])
def test_biases_move_after_gradients_are_final_and_only_where_they_are_accepted(accepted):
    seen = []
    chain = GradientChain(lambda *_: seen.append("final"), seen.append, lambda losses: accepted)
    chain()
    assert seen == ["final", accepted] and chain.accepted is accepted


def step_with(times):
    """A step through a schedule that finalises so often; what is said."""
    from runs import assembled

    from dsplugins.failures import PluginFailure
    from dsplugins.step import Progress, take_step

    with assembled([]) as run:
        real = run.forward_backward

        def forward_backward(**given):
            losses = real(**given)
            for _ in range(times - 1):
                run.chain(given["model"])
            return losses

        if not times:
            for config in run.configs:
                config.finalize_model_grads_func = None
        object.__setattr__(run, "forward_backward", forward_backward)
        try:
            take_step(run, Progress())
        except PluginFailure as error:
            return str(error)
    return None


@pytest.mark.parametrize("times", [0, 1, 2])
def test_a_schedule_that_does_not_finalise_once_is_stopped_at_its_first_step(workers, times):
    (said,) = workers(1).run(step_with, times)
    if times == 1:
        assert said is None
    else:
        assert said.startswith("plugin one_f_one_b failed in forward_backward: it called ")
        assert f"finalize_model_grads_func {times} times" in said


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
