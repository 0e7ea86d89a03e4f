"""Class-conditional handwritten digits, 8 x 8: the first model to train.

python main.py --config=configs/digits.py --workdir=runs/digits
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.data.name = "digits"
    c.data.std = 0.75

    c.model.name = "unet"
    c.model.unet.update(
        widths=(32, 64), blocks=1, attention=(0, "self"), num_heads=4, norm_groups=8
    )
    c.model.dit.update(width=128, depth=4, heads=4, patch=2, unit_embeddings=True)

    c.objective.schedule = "cosine"
    c.objective.prediction = "v"

    c.optimizer.learning_rate = 2e-3
    c.optimizer.decay = "cosine"

    c.ema = "power_function(sigma_rel=0.1)"

    c.train.steps = 600
    c.train.batch_size = 64
    c.train.checkpoint_every = 300

    c.sampler.solver = "dpmpp_2m"
    c.sampler.steps = 20
    c.sampler.guidance = 1.5

    c.evaluation.classifier = "digits_svc"
    c.evaluation.count = 1000
    return c
