"""EDM on class-conditional CIFAR-10 (Karras et al., 2022), with DDPM's U-Net twice as deep.

    python main.py --config=configs/cifar10_edm.py --workdir=runs/cifar10_edm

The images are downloaded, or come from ``--config.data.dir=DIR`` with ``cifar-10-binary.tar.gz``,
``cifar10_jpegq75.npz`` or TFDS's ``cifar10`` in it. Theirs adds non-leaking augmentation and the
DDPM++ / NCSN++ backbones.

Hardware: one GPU of 40 GB or more. Not yet run. (Published: FID 1.79 with 200 M images.)
"""

from ml_collections import ConfigDict

from configs import cifar10_ddpm


def get_config() -> ConfigDict:
    c = cifar10_ddpm.get_config()
    c.data.std = 0.5

    c.model.unet.update(
        widths=(128, 256, 256), blocks=4, attention=(0, "self", 0), dropout=0.13, head_width=64
    )
    c.model.unet.update(time_cos_first=True, time_freq_shift=0.0, asymmetric_downsampling=False)
    # c_noise = log(sigma) / 4 is small: spread it over the sinusoids.
    c.model.unet.time_scale = 250.0

    c.objective.schedule = "edm"
    c.objective.prediction = "edm"
    c.objective.times = "log_normal(mean=-1.2, std=1.2)"
    c.objective.weighting = "edm"
    c.objective.stratified = True
    c.objective.conditional = True

    c.optimizer.learning_rate = 1e-3
    c.optimizer.warmup = 20_000
    c.ema = "power_function(sigma_rel=0.05)"

    c.train.steps = 400_000
    c.train.batch_size = 512

    c.sampler.solver = "heun"
    c.sampler.grid = "karras"
    c.sampler.steps = 18
    c.sampler.guidance = ()
    return c
