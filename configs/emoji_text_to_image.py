"""Pictures for captions, from scratch: emoji, flags and dungeon tiles, 32 x 32, in latent space.

python main.py --config=configs/emoji_text_to_image.py --workdir=runs/emoji
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.data.name = "emoji_and_tiles"
    c.data.dir = "data"
    c.data.tokenizer = "data/tokenizer/bpe_simple_vocab_16e6.txt.gz"
    c.data.autoencoder = "runs/emoji_autoencoder/autoencoder"
    c.data.cache = "runs/emoji_latents"
    c.data.std = 1.0

    c.model.name = "dit"
    c.model.dit.update(
        width=256,
        depth=6,
        heads=4,
        patch=1,
        cross_attention=True,
        pooled=True,
        qk_norm=True,
        unit_embeddings=True,
    )
    c.model.text.update(width=192, depth=2, heads=3)

    c.objective.schedule = "rectified_flow"
    c.objective.prediction = "flow"
    c.objective.times = "logit_normal"
    c.objective.label_dropout = 0.15

    c.optimizer.learning_rate = 1e-3
    c.optimizer.warmup = 300
    c.optimizer.decay = "cosine"
    c.ema = "power_function(sigma_rel=0.05)"

    c.train.steps = 15_000
    c.train.batch_size = 64
    c.train.sample_every = 3000
    c.train.checkpoint_every = 1000

    c.sampler.solver = "dpmpp_2m"
    c.sampler.steps = 25
    c.sampler.guidance = 3.0
    c.sampler.clip = False
    c.samples.columns = 8
    return c
