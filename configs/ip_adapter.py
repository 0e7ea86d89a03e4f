"""Trains an IP-Adapter: pictures as prompts (Ye et al., 2023).

    python main.py --config=configs/ip_adapter.py --workdir=runs/style \\
        --config.model.path=PIPELINE --config.data.dir=PAIRS.npz \\
        --config.objective.adapter="ip_adapter(encoder='ENCODER', features=1024)"
    python main.py --mode=generate --config.model.path=PIPELINE --config.samples.prompt="a house" \\
        --config.image_prompts="ip_adapter('runs/style', image='x.png', scale=0.6)"

ENCODER is a folder of CLIP's image encoder as transformers saves it, and ``features`` the width of
its embedding. Picture, text and both are left out in 5 % of the examples each.

Hardware: as configs/finetune_lora.py; not yet run at full size.
"""

from ml_collections import ConfigDict

from configs import finetune_lora


def get_config() -> ConfigDict:
    c = finetune_lora.get_config()
    c.data.size = 512
    c.objective.dropout = "image_prompt"
    c.objective.label_dropout = 0.05
    c.train.steps = 100_000
    c.train.batch_size = 8
    return c
