"""Trains a LoRA, or another adapter, for a model: a run of this project or a pretrained pipeline.

    python main.py --config=configs/finetune_lora.py --workdir=runs/lora --config.model.path=MODEL \
        --config.data.dir=PAIRS.npz

MODEL is a run's workdir, a folder as diffusers saves it, or a hub id. PAIRS.npz holds ``images``
[N, H, W, 3] uint8 and ``caption`` [N]; any other data of config.data do as well. The run draws with
the adapter merged in, its checkpoints hold the adapter alone, and ``runs/lora/adapter.safetensors``
is what other software reads.

Options people use: ``--config.objective.adapter="lora(rank=16, alpha=16, targets='transformer')"``
with the targets attention, transformer, all or a regular expression over parameters' paths, which
begin with text/ and image/ where there is a text encoder; ``dora=True``;
``--config.optimizer.rates="(('/up$', 16.0), ('text/', 0.1))"`` for LoRA+ and a slower text encoder;
``--config.model.dtype=bfloat16`` for a base in half the memory; ``--config.model.remat=True``.
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
