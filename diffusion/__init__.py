"""Diffusion and flow models in JAX. ``diffusion.compiler.tune`` makes a CPU process faster."""
