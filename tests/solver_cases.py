"""Every solver as a function (grid, schedule) -> table, and what it claims."""

import inspect
from functools import partial
from typing import NamedTuple

from diffusion.sampling import solvers
from diffusion.sampling.solvers.dpm_solver import multistep
from diffusion.sampling.solvers.predictor_corrector import stochastic_adams
from diffusion.sampling.tables import Solver


class Case(NamedTuple):
    """A deterministic solver and its order; with ``short``, if the first few steps are short."""

    make: partial
    order: int
    short: bool = False


def use(solver, **options):
    """``solver`` with options, called with a grid and, where it wants it, the schedule."""

    def make(grid, schedule) -> Solver:
        wants = "schedule" in inspect.signature(solver).parameters
        return solver(grid, **({"schedule": schedule} if wants else {}), **options)

    make.__name__ = solver.__name__ + "".join(f"-{v}" for v in options.values())
    return make


def _stochastic_adams(grid, taus=0.0, predictor=2, corrector=2, **options):
    n = len(grid.t) - 1
    return stochastic_adams(grid, [taus] * n, [predictor] * n, [corrector] * n, **options)


_S = solvers
DETERMINISTIC = {
    case.make.__name__: case
    for case in [
        *(Case(use(f), 1) for f in (_S.ddim, _S.euler)),
        *(Case(use(f), 2) for f in (_S.heun, _S.flow_heun, _S.midpoint, _S.dpm2)),
        *(Case(use(f, eta=0.0), 1) for f in (_S.euler_ancestral,)),
        *(Case(use(f, eta=0.0), 2) for f in (_S.dpm2_ancestral, _S.dpmpp_2s_ancestral)),
        Case(use(_S.dpmpp_sde, eta=0.0), 2),
        Case(use(_S.edm, churn=0.0), 2),
        *(Case(use(_S.dpmpp_2m, kind=kind), 2) for kind in ("midpoint", "heun")),
        Case(use(_S.dpmpp_3m), 3, short=True),
        Case(use(multistep, order=3, curvature=1.0), 2, short=True),
        Case(use(_S.dpm_solver, order=1), 1),
        *(Case(use(_S.dpm_solver, order=2, kind=kind), 2) for kind in ("midpoint", "heun")),
        Case(use(_S.dpm_solver, order=3), 3, short=True),
        *(Case(use(_S.dpmpp_2s, kind=kind), 2) for kind in ("midpoint", "heun")),
        *(Case(use(_S.dpmpp_3s, kind=kind), 3) for kind in ("midpoint", "heun")),
        *(Case(use(_S.dpm_solver_singlestep, order=k), k) for k in (1, 2, 3)),
        Case(use(_S.dpm_solver_singlestep, order=3, kind="heun"), 3),
        *(Case(use(_S.lms, order=k), k, short=True) for k in (1, 2, 3, 4)),
        *(Case(use(_S.deis, order=k), k, short=True) for k in (2, 3, 4)),
        Case(use(_S.gradient_estimation), 1),
        *(Case(use(f), 2) for f in (_S.ipndm, _S.plms, _S.pndm)),
        *(Case(use(_S.unipc, order=k), k + 1, short=k > 2) for k in (1, 2, 3)),
        *(Case(use(_S.unipc, order=k, kind="bh1"), k + 1, short=k > 2) for k in (2, 3)),
        *(Case(use(_S.unipc, order=k, prediction="eps"), k + 1, short=True) for k in (2, 3)),
        Case(use(_S.sa_solver, tau=0.0), 4, short=True),
        Case(use(_stochastic_adams, predictor=1, corrector=1), 1),
        Case(use(_stochastic_adams), 2),
        Case(use(_stochastic_adams, predictor=2, corrector=3, prediction="eps"), 3, short=True),
    ]
}

# Those that have the marginals of a Gaussian in the limit of many steps.
STOCHASTIC = {
    make.__name__: make
    for make in [
        use(_S.ddpm),
        *(use(_S.ddim, eta=eta) for eta in (0.5, 1.0)),
        use(_S.euler_ancestral),
        *(use(f) for f in (_S.dpm2_ancestral, _S.dpmpp_2s_ancestral, _S.dpmpp_sde)),
        use(_S.dpmpp_2m_sde),
        use(_S.dpmpp_2m_sde, kind="heun", eta=0.5),
        use(_S.dpmpp_3m_sde),
        use(_S.dpmpp_2s, eta=1.0),
        use(_S.dpm_solver, eta=1.0),
        use(_S.sa_solver),
        use(_stochastic_adams, taus=1.0, predictor=3, corrector=3, prediction="eps"),
        use(_S.edm, churn=10.0, low=0.05, high=20.0, s_noise=1.0),
    ]
}

# Right for what they were made for: points (consistency models), or unit variance.
SPECIAL = {
    make.__name__: make
    for make in [use(_S.ddpm_large), use(_S.lcm), use(_S.tcd), use(_S.consistency)]
}

ALL = {**{name: case.make for name, case in DETERMINISTIC.items()}, **STOCHASTIC, **SPECIAL}
