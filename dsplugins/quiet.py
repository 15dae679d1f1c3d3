"""Warnings of megatron-core and torch that say nothing to whoever runs a recipe: each listed, with why.

They would stand between the table of plugins and the first step, once a rank. Any other warning is shown.
"""

from __future__ import annotations

import logging
import warnings
from functools import partial

KNOWN = (
    r"(Transformer Engine and )?Apex (is|are) not installed",  # the table of plugins says what is used
    r"absl\.logging is not installed",  # core's substitute logs as well
    r"full scope is deprecated",  # core's own default of cuda_graph_modules
    r"MimoModelConfig is experimental",  # imported by core, not used
    r"The \.grad attribute of a Tensor that is not a leaf",  # core looks at shards of the master weights
    r"Could not determine rank from torch\.distributed",  # outside of a run: there is one process
    r"torch\.distributed is disabled, unavailable or uninitialized",  # a checkpoint is read outside of a run
    r"`torch\.distributed\.\w+` is deprecated",  # core's calls
)
"""Beginnings of messages, as regular expressions."""
LOGGERS = {
    "torch.utils.cpp_extension": "No CUDA runtime is found",  # the platform slot says where tensors live
}
"""Logger -> the message that it may keep to itself."""


def quiet() -> None:
    """Keep this process from showing them; before megatron-core is imported."""
    for message in KNOWN:
        warnings.filterwarnings("ignore", message=message)
    for name, message in LOGGERS.items():
        logging.getLogger(name).addFilter(partial(_says_more, message))


def _says_more(known: str, record: logging.LogRecord) -> bool:
    return known not in record.getMessage()


__all__ = ["quiet"]
