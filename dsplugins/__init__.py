"""DeepSeek-V3 training as plugins on unmodified megatron-core."""

__version__ = "0.1.0"
