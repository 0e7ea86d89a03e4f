"""A workdir with checkpoints of steps 3 and 6, of which the first is the better, and snapshots."""

import jax
import numpy as np

from diffusion.runs import snapshots
from diffusion.runs.checkpoints import Checkpoints
from diffusion.training.state import TrainState


def initial(classes=10):
    """The parameters of a model with this many classes, as they would begin."""
    return {
        "network": {
            "conv_in": {"kernel": np.zeros((2, 3), np.float32), "bias": np.zeros(3, np.float32)},
            "conv_out": {"kernel": np.zeros(4, np.float32)},
        },
        "head": {"kernel": np.zeros((3, classes), np.float32)},
    }


def write(workdir):
    """Writes it; all parameters of a step equal the step's number."""
    checkpoints = Checkpoints(workdir, keep=1, keep_best=1, best="loss")
    save = snapshots.writer(workdir, 3)
    for step in (3, 6):
        tree = jax.tree.map(lambda x, step=step: jax.numpy.full(x.shape, float(step)), initial())
        emas = {"ema": tree} | dict.fromkeys(snapshots.profiles(), tree)
        state = TrainState(jax.numpy.int32(step), tree, tree, emas)
        checkpoints.save(state, metrics={"loss": step})
        save(state, step)
    checkpoints.close()
    return workdir
