"""Every solver: functions ``grid -> Solver``, by the names they have on the command line.

Those that evaluate between the grid's nodes take the schedule too.
"""

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
from diffusion.sampling.solvers.table_file import given

__all__ = [
    "consistency",
    "ddim",
    "ddpm",
    "ddpm_large",
    "deis",
    "dpm2",
    "dpm2_ancestral",
    "dpm_solver",
    "dpm_solver_singlestep",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_2s",
    "dpmpp_2s_ancestral",
    "dpmpp_3m",
    "dpmpp_3m_sde",
    "dpmpp_3s",
    "dpmpp_sde",
    "edm",
    "euler",
    "euler_ancestral",
    "flow_heun",
    "given",
    "gradient_estimation",
    "heun",
    "ipndm",
    "lcm",
    "lms",
    "midpoint",
    "plms",
    "pndm",
    "repaint",
    "restart",
    "sa_solver",
    "tcd",
    "unipc",
]

CHOICES = {name: globals()[name] for name in __all__}
