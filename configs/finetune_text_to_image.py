"""Fine-tunes the U-Net of Stable Diffusion 1 or 2 on images with captions.

    python main.py --config=configs/finetune_text_to_image.py --workdir=runs/tuned \
        --config.model.path=PIPELINE --config.data.dir=PAIRS.npz --config.data.cache=CACHE

PIPELINE is a folder as diffusers saves one, or has its subfolders ``unet``, ``vae``,
``text_encoder``, ``tokenizer`` and ``scheduler``. PAIRS.npz holds ``images`` [N, H, W, 3] uint8 and
``caption`` [N]. Latents and text embeddings are computed once, into CACHE. The result is
``runs/tuned/pipeline``, which diffusers loads.

Options people use: ``--config.objective.noise="gaussian(offset=0.1, perturbation=0.1)"``,
``weighting="min_snr(gamma=5)"``; v-prediction with zero terminal SNR is
``prediction=v`` with ``schedule="zero_terminal_snr(scaled_linear)"``.

Hardware: for 512 x 512, a GPU of 40 GB; not yet run there. (A tiny random pipeline is fine-tuned,
exported and loaded in the tests.)
"""

from ml_collections import ConfigDict, FieldReference

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    pipeline = FieldReference("", field_type=str)

    c.data.name = "captioned"
    c.data.size = 512
    c.data.tokens = 77
    c.data.autoencoder = pipeline + "/vae"
    c.data.text_encoder = pipeline + "/text_encoder"
    c.data.tokenizer = pipeline + "/tokenizer"
    c.data.std = 1.0

    c.model.name = "pretrained"
    c.model.path = pipeline
    c.model.remat = True

    c.objective.schedule = "scaled_linear"
    c.objective.prediction = "eps"
    c.objective.times = "discrete"
    c.objective.stratified = False
    c.objective.label_dropout = 0.1

    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = 1e-5
    c.optimizer.warmup = 500
    c.optimizer.weight_decay = 1e-2
    c.ema = "constant(decay=0.9999)"

    c.train.steps = 10_000
    c.train.batch_size = 8
    c.train.accumulate = 4
    c.train.sample_every = 1000

    c.sampler.steps = 25
    c.sampler.guidance = "cfg(7.5)"
    c.sampler.batch_size = 4
    c.samples.columns = 4
    c.samples.count = 16
    c.evaluation.count = 64
    return c
