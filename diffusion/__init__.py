"""Diffusion and flow models in JAX."""

from diffusion import allocator, compiler

compiler.set_options()  # before JAX asks for a device
if compiler.for_cpus_alone():
    allocator.keep_freed()
