"""What the plugin `fp8_monitor` is made of: what it counts, and what it calls the modules."""
