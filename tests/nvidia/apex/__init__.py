"""The interface of NVIDIA's apex as far as it is used here, on the CPU, in torch."""
