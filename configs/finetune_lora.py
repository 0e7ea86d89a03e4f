"""Trains a LoRA for a model: a run of this project, or a pretrained pipeline.

    python main.py --config=configs/finetune_lora.py --workdir=runs/lora \\
        --config.model.path=PIPELINE --config.data.dir=PAIRS.npz
    python main.py --config=configs/finetune_lora.py --workdir=runs/digits_lora \\
        --config.model.path=runs/digits --config.data.name=digits
    python main.py --mode=sample --workdir=runs/digits --config.adapters="runs/digits_lora(0.8)"

PIPELINE is a folder as diffusers saves it, a hub id or the workdir of a text-to-image run.
PAIRS.npz holds ``images`` [N, H, W, 3] uint8 and ``caption`` [N]; other data of config.data do as
well. The run draws with the LoRA merged in. Its checkpoints hold the LoRA alone, and
``runs/lora/adapter.safetensors`` is what other software reads.

Options people use: ``--config.objective.adapter="lora(rank=16, alpha=16, targets='transformer')"``
(adapters/low_rank/lora.py: targets are attention, transformer, all, or a regular expression over
the paths of layers, which begin with text/ and image/ where there is a text encoder; dora, dropout,
kind='loha' or 'lokr'); ``full()`` trains all parameters instead, ``full('image/')`` without the
text encoder; ``--config.optimizer.rates="(('/up$', 16.0), ('text/', 0.1))"`` for LoRA+ and a slower
text encoder; ``--config.model.dtype=bfloat16`` for a base in half the memory;
``--config.data.shuffle_tags=True`` for captions that are tags.

Hardware: for Stable Diffusion 1.5, a GPU of 16 GB; not yet run there. (Tiny random pipelines and
small runs are adapted in the tests.)
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.data.name = "captioned"

    c.model.name = "pretrained"
    c.objective.adapter = "lora(rank=16, alpha=16)"
    c.objective.schedule = "auto"
    c.objective.prediction = "auto"

    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = 1e-4
    c.optimizer.weight_decay = 1e-2
    c.ema = "constant(decay=0.99)"

    c.train.steps = 2000
    c.train.batch_size = 4
    c.train.sample_every = 500
    c.samples.columns = 4
    c.evaluation.metrics = ()
    return c
