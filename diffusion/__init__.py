"""Diffusion and flow models in JAX."""

from diffusion.compiler import set_options

set_options()  # before JAX asks for a device
