"""A table that was written to a file, such as a learned one."""

from __future__ import annotations

from diffusion.levels import NoiseLevel
from diffusion.sampling import learned_tables
from diffusion.sampling.tables import Solver, nodes


def given(grid: NoiseLevel, path: str = "") -> Solver:
    """The table in the ``.npz`` file ``path``, which brings its own levels.

    The grid says only how many evaluations are wanted.

    Raises:
      ValueError: if the table has another number of evaluations, or path names no table.
    """
    if not path:
        raise ValueError("given needs the file of a table, as in given(path='learned.npz')")
    solver = learned_tables.load(path)
    if solver.evaluations != len(nodes(grid)) - 1:
        raise ValueError(
            f"{path} has {solver.evaluations} evaluations, but the sampler's steps are "
            f"{len(nodes(grid)) - 1}; set steps={solver.evaluations}"
        )
    return solver
