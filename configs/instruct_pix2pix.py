"""Trains a model to edit pictures as a text says: InstructPix2Pix (Brooks et al., 2023).

    python main.py --config=configs/instruct_pix2pix.py --workdir=runs/editor \
        --config.model.path=PIPELINE --config.data.dir=EDITS.npz
    python main.py --mode=generate --config.model.path=runs/editor --config.samples.image=x.png \
        --config.samples.prompt="make it red" --config.sampler.guidance="instruct(7.5, 1.5)"

EDITS.npz holds ``images`` and ``edited`` [N, H, W, 3] uint8 and ``caption`` [N], the instructions;
a folder's metadata.jsonl names both files. All of the network is trained, whose first layer gets
channels for the picture; text, picture and both are left out in 5 % of the examples each.

Hardware: a GPU of 40 GB for Stable Diffusion 1.5; not yet run there.
"""

from ml_collections import ConfigDict

from configs import finetune_lora


def get_config() -> ConfigDict:
    c = finetune_lora.get_config()
    c.data.name = "edits"
    c.data.size = 256
    c.objective.adapter = "instruct()"
    c.objective.dropout = "instruct"
    c.objective.label_dropout = 0.05
    c.optimizer.learning_rate = 5e-5
    c.ema = "constant(decay=0.999)"
    c.train.steps = 15_000
    c.train.batch_size = 16
    c.sampler.guidance = ("instruct(7.5, 1.5)",)
    return c
