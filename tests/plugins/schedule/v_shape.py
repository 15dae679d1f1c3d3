"""A third party's schedule that places the layers: the V of DualPipeV, without its overlap.

Rank r of P holds stage r and stage 2P - 1 - r, so the first rank has both the embedding and the head.
"""

from __future__ import annotations

from dsplugins.hookspecs import hookimpl


class VSchedule:
    chunks = 2

    def __init__(self, ranks):
        self.ranks = ranks

    def forward_backward(self):
        from v_parts import one_after_the_other

        return one_after_the_other

    def finalize_grads(self):
        from v_parts import finalize

        return finalize

    def refuses(self, microbatches):
        return None


class VShape:
    @hookimpl
    def ds_settings(self, plan):
        from v_parts import VLayout

        return {
            "model.pipeline_model_parallel_layout": VLayout(stages(plan), plan.layout.pipeline),
            "model.overlap_p2p_comm": True,
            "model.batch_p2p_comm": False,
        }

    @hookimpl
    def ds_schedule(self, plan):
        return VSchedule(plan.layout.pipeline)


def stages(plan):
    """The model's parts in their order, cut into 2P stages of as many decoder layers."""
    layers, count = plan.model["num_layers"], 2 * plan.layout.pipeline
    cut = [["decoder"] * (layers // count) for _ in range(count)]
    mtp = ["mtp"] * bool(plan.slots.get("mtp"))
    return [["embedding", *cut[0]], *cut[1:-1], [*cut[-1], *mtp, "loss"]]
