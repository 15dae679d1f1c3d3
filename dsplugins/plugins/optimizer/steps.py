"""One step counter for each parameter, whatever megatron-core's wrappers do with it.

megatron-core's DistributedOptimizer saves the counter in the param group, and without Transformer
Engine restores it as *one* tensor that every parameter's state points to: torch then adds 1 to it as
often as there are parameters. With Transformer Engine installed it doesn't restore a torch optimizer's
counter at all (distrib_optimizer.py, `state_dict` and `load_state_dict`).
"""

from __future__ import annotations

from typing import Any

import torch


def keep_steps(optimizer: torch.optim.Optimizer) -> None:
    """Let `optimizer` carry its counters in saved groups too, and give each state its own on loading."""
    optimizer.register_state_dict_post_hook(_into_groups)
    optimizer.register_load_state_dict_pre_hook(_out_of_groups)


def _into_groups(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Write each group's counter next to its learning rate."""
    for group in state_dict["param_groups"]:
        for index in group["params"]:
            if "step" in state_dict["state"].get(index, {}):
                group["step"] = int(state_dict["state"][index]["step"].item())
                break


def _out_of_groups(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A copy of the dictionary in which no two states share a counter; the group's counter wins."""
    states = {index: dict(state) for index, state in state_dict["state"].items()}
    for group in state_dict["param_groups"]:
        for index in group["params"]:
            if index in states:
                step = group.get("step", states[index].get("step", 0.0))
                states[index]["step"] = torch.tensor(float(step))
    return {**state_dict, "state": states}
