"""Rectified flow on class-conditional CIFAR-10: velocity, logit-normal times, 50 Euler steps.

    python main.py --config=configs/cifar10_flow.py --workdir=runs/cifar10_flow

The images are downloaded, or come from ``--config.data.dir=DIR`` with ``cifar-10-binary.tar.gz``,
``cifar10_jpegq75.npz`` or TFDS's ``cifar10`` in it.

Hardware: one GPU of 16 GB or more. Not yet run.
"""

from ml_collections import ConfigDict

from configs import cifar10_ddpm


def get_config() -> ConfigDict:
    c = cifar10_ddpm.get_config()
    c.objective.schedule = "rectified_flow"
    c.objective.prediction = "flow"
    c.objective.times = "logit_normal"
    c.objective.stratified = True
    c.objective.conditional = True
    c.model.unet.update(time_cos_first=True, time_freq_shift=0.0)

    c.train.steps = 400_000

    c.sampler.solver = "euler"
    c.sampler.steps = 50
    c.sampler.guidance = ()
    return c
