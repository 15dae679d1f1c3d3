"""What happens between backward and optimizer: one chain that the loop owns and prints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class GradientChain:
    """Links in order: the pipeline schedule's gradient finalisation, then the routers' balance.

    Stands in megatron-core's `config.finalize_model_grads_func`, which each schedule calls at the end
    of its last backward.
    """

    def __init__(self, finalize_grads: Callable[..., None], balance: Callable[[], None]) -> None:
        self.finalize_grads, self.balance = finalize_grads, balance

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.finalize_grads(*args, **kwargs)
        self.balance()

    def __str__(self) -> str:
        first = getattr(self.finalize_grads, "__name__", type(self.finalize_grads).__name__)
        return f"{first} -> router counts and bias update"
