"""All solvers: functions ``grid -> Solver``, with the names that a config calls them by.

Solvers that evaluate between the grid's nodes also take the schedule. Options out of the ranges
given, and a grid that does not go from more to less noise, raise ValueError.
"""
# ruff: noqa: F401

from diffusion.sampling.solvers.adams import deis, gradient_estimation, ipndm, lms, plms, pndm
from diffusion.sampling.solvers.dpm_solver import (
    dpm_solver,
    dpm_solver_singlestep,
    dpmpp_2m,
    dpmpp_2m_sde,
    dpmpp_2s,
    dpmpp_2s_ancestral,
    dpmpp_3m,
    dpmpp_3m_sde,
    dpmpp_3s,
    dpmpp_sde,
)
from diffusion.sampling.solvers.one_step import (
    consistency,
    ddim,
    ddpm,
    ddpm_large,
    euler,
    euler_ancestral,
    lcm,
    tcd,
)
from diffusion.sampling.solvers.predictor_corrector import sa_solver, unipc
from diffusion.sampling.solvers.restart import repaint, restart
from diffusion.sampling.solvers.runge_kutta import (
    dpm2,
    dpm2_ancestral,
    edm,
    flow_heun,
    heun,
    midpoint,
)
from diffusion.sampling.solvers.table_file import from_file

CHOICES = {name: value for name, value in globals().items() if callable(value)}
