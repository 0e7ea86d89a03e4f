"""Orders of convergence of every deterministic solver, on the exact flow of a mixture."""

import jax
import numpy as np
import pytest
from mixture import P, at, quantile, run
from solver_cases import DETERMINISTIC

from diffusion import schedules
from diffusion.sampling import grids

STEPS = [144, 288, 576]
FLOW = schedules.RectifiedFlow()
TRIGONOMETRIC = schedules.TrigonometricFlow()

# From s = 0 (noisy) to s = 1.
PATHS = {
    "vp": (schedules.VPSDE(), lambda s: 0.6 - 0.4 * s),
    "edm": (schedules.EDM(), lambda s: (20 ** (1 / 7) + s * (0.1 ** (1 / 7) - 20 ** (1 / 7))) ** 7),
    "flow": (FLOW, lambda s: 0.9 - 0.8 * s),
}
FROM_NOISE = {
    "flow": (FLOW, lambda s: 1 - 0.9 * s),
    "zero_terminal_snr": (TRIGONOMETRIC, lambda s: 1 - 0.9 * s),
}


def places(n, short):
    """s of the nodes; with ``short``, six more, so that the first step has the length 1/n^2."""
    s = np.linspace(0, 1, n + 1)
    return np.concatenate([[0], np.geomspace(n**-2.0, 1 / n, 7)[:-1], s[1:]]) if short else s


def slope(make, schedule, times, short):
    errors = []
    with jax.enable_x64(True):
        for n in STEPS:
            grid = grids.from_times(schedule, times(places(n, short)))
            end = run(make(grid, schedule), quantile(P, at(grid, 0)))
            errors.append(np.sqrt(np.mean((end - quantile(P, at(grid, -1))) ** 2)))
    return -np.polyfit(np.log(STEPS), np.log(errors), 1)[0], errors


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order_of_convergence(name, path):
    make, order, short = DETERMINISTIC[name]
    measured, errors = slope(make, *PATHS[path], short)
    assert abs(measured - order) < 0.25, (measured, errors)


@pytest.mark.parametrize("path", FROM_NOISE)
@pytest.mark.parametrize("name", ["euler", "heun", "flow_heun", "midpoint", "dpmpp_2m-midpoint"])
def test_order_of_convergence_from_pure_noise(name, path):
    make, order, short = DETERMINISTIC[name]
    measured, errors = slope(make, *FROM_NOISE[path], short)
    assert abs(measured - order) < 0.25, (measured, errors)


@pytest.mark.parametrize(("name", "order"), [("plms", 2), ("pndm", 4)])
def test_even_ratios_give_the_weights_their_order(name, order):
    """Adams-Bashforth with constant weights, where sigma / alpha is evenly spaced."""
    schedule = schedules.EDM()
    make = DETERMINISTIC[name].make
    measured, errors = slope(make, schedule, lambda s: 3 - 2.5 * s, short=False)
    assert measured > order - 0.25, (measured, errors)
