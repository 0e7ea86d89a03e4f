"""DDPM on CIFAR-10 as published (Ho et al., 2020): 35.7 M parameters, 800,000 steps.

    python main.py --config=configs/cifar10_ddpm.py --workdir=runs/cifar10_ddpm

The images are downloaded, or come from ``--config.data.dir=DIR`` with ``cifar-10-binary.tar.gz``,
``cifar10_jpegq75.npz`` or TFDS's ``cifar10`` in it.

Hardware: one GPU of 16 GB or more. Not yet run. (Published: FID 3.17.)
"""

from ml_collections import ConfigDict

from configs import base
from diffusion.models.unet import ddpm_cifar10


def get_config() -> ConfigDict:
    c = base.get_config()
    c.data.name = "cifar10"
    c.data.flip = True

    c.model.name = "unet"
    c.model.unet.update(base.values(ddpm_cifar10()))
    c.model.dit.update(width=384, depth=12, heads=6, patch=2)

    c.objective.schedule = "linear"
    c.objective.prediction = "eps"
    c.objective.times = "discrete"
    c.objective.stratified = False
    c.objective.conditional = False

    c.optimizer.learning_rate = 2e-4
    c.optimizer.warmup = 5000
    c.ema = "constant(decay=0.9999)"

    c.train.steps = 800_000
    c.train.batch_size = 128
    c.train.log_every = 100
    c.train.sample_every = 20_000
    c.train.checkpoint_every = 10_000

    c.sampler.solver = "ddpm_large"
    c.sampler.grid = "uniform"
    c.sampler.steps = 1000
    return c
