"""Tables in files, such as learned ones."""

from __future__ import annotations

import numpy as np

from diffusion.levels import NoiseLevel
from diffusion.sampling.tables import REGISTERS, Solver, nodes


def from_file(grid: NoiseLevel, path: str = "") -> Solver:
    """The table in the ``.npz`` file ``path``, with its own levels.

    Of the grid, only the number of steps matters: it must be the table's number of evaluations.
    """
    if not path:
        raise ValueError("from_file needs the path of a table, as in from_file(path='learned.npz')")
    solver, steps = load(path), len(nodes(grid)) - 1
    if solver.evaluations != steps:
        raise ValueError(
            f"{path} has {solver.evaluations} evaluations, but the sampler's steps are {steps}; "
            f"set steps={solver.evaluations}"
        )
    return solver


def save(path: str, solver: Solver) -> None:
    """Writes a table as ``.npz``."""
    level = {f"level_{name}": leaf for name, leaf in solver.level._asdict().items()}
    rest = {name: leaf for name, leaf in solver._asdict().items() if name != "level"}
    np.savez(path, **level, **rest)


def load(path: str) -> Solver:
    """Reads a table that ``save`` wrote; raises ValueError for a file that is not a table."""
    try:
        with np.load(path) as file:
            data = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise
    except Exception as error:  # zipfile's, pickle's, NumPy's, zlib's
        raise ValueError(f"{path} is not a solver's table, or damaged") from error
    names = [*(f"level_{n}" for n in NoiseLevel._fields), *Solver._fields[1:]]
    missing = [name for name in names if name not in data]
    if missing:
        raise ValueError(f"{path} is not a solver's table: it has no {', '.join(missing)}")
    leaves = [data[name] for name in names]
    solver = Solver(NoiseLevel(*leaves[:3]), *leaves[3:])
    if solver.A.shape != (len(solver.level.t), REGISTERS, REGISTERS):
        raise ValueError(
            f"{path} has registers {solver.A.shape}; expected [R, {REGISTERS}, {REGISTERS}]"
        )
    return solver
