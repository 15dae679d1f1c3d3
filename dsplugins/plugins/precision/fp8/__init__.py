"""DeepSeek-V3's FP8: formats, products, linears, experts. `fp8_v3` is the plugin."""
