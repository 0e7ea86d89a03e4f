"""Your own small colour images, 32 x 32 or 64 x 64, on a CPU or one GPU.

    python main.py --config=configs/small_images.py --workdir=runs/flowers --config.data.dir=FLOWERS
    python main.py --config=configs/small_images.py --workdir=runs/flowers64 \
      --config.data.dir=FLOWERS --config.data.size=64 --config.model.unet.blocks=2 \
      --config.model.unet.widths="(64,128,256,256)" \
      --config.model.unet.attention="(0,0,'self','self')"

FLOWERS is a folder of a few hundred images or more, in class subfolders or not; ``--mode=inspect``
shows them as training sees them, and what ``data.std`` should be. The first command's U-Net is for
CPUs; the second's, of 31 M parameters, is for a GPU.

Hardware: some CPU cores, or one GPU of 8 GB. Not yet trained to the end.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.data.name = "folder"
    c.data.size = 32
    c.data.channels = 3
    c.data.flip = True

    c.model.name = "unet"
    c.model.unet.update(
        widths=(32, 64, 128), blocks=1, attention=(0, 0, "self"), dropout=0.1, head_width=32
    )

    c.objective.schedule = "cosine"
    c.objective.prediction = "v"

    c.optimizer.learning_rate = 5e-4
    c.optimizer.warmup = 500
    c.optimizer.decay = "cosine"
    c.ema = "power_function(sigma_rel=0.1)"

    c.train.steps = 10_000
    c.train.batch_size = 32
    c.train.checkpoint_every = 1000
    c.train.sample_every = 1000

    c.sampler.solver = "dpmpp_2m"
    c.sampler.steps = 20
    c.sampler.guidance = ("clip()",)

    c.evaluation.metrics = ("memorisation()",)
    c.evaluation.count = 500
    return c
