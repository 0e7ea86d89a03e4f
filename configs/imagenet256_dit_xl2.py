"""DiT-XL/2 on ImageNet's latents, 32 x 32 x 4 (Peebles & Xie, 2022): 675 M parameters.

    python main.py --config=configs/imagenet256_dit_xl2.py --workdir=runs/dit_xl2 \
        --config.data.dir=latents.npz

``latents.npz`` holds ``x`` [N, 32, 32, 4], the Stable Diffusion autoencoder's latents of the
images (scaled by ``data.scale``), and ``label`` [N]. There is no autoencoder here: samples are
latents too, and pictures show their first three channels.

Hardware: eight GPUs of 80 GB. Not yet run. (Published: FID 2.27 at 7 M steps, guidance 1.5.)
"""

from ml_collections import ConfigDict

from configs import base
from diffusion.models.dit import preset


def get_config() -> ConfigDict:
    c = base.get_config()
    c.data.name = "latents"
    c.data.scale = 0.18215
    c.data.num_classes = 1000
    c.data.std = 1.0

    c.model.name = "dit"
    c.model.dtype = "bfloat16"
    c.model.dit.update(preset("XL/2"))
    c.model.dit.scan = True
    c.model.dit.remat = True

    c.objective.schedule = "linear"
    c.objective.prediction = "eps"
    c.objective.times = "discrete"
    c.objective.stratified = False
    c.objective.terms = "variational_bound()"

    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = 1e-4
    c.optimizer.warmup = 0
    c.optimizer.clip_norm = 0.0
    c.ema = "constant(decay=0.9999)"

    c.train.steps = 400_000
    c.train.batch_size = 256
    c.train.log_every = 100
    c.train.checkpoint_every = 10_000

    c.sampler.solver = "ddpm"
    c.sampler.steps = 250
    c.sampler.guidance = "cfg(1.5)"
    c.sampler.batch_size = 64
    return c
