"""Teaches a text encoder one new word: textual inversion (Gal et al., 2023).

    python main.py --config=configs/textual_inversion.py --workdir=runs/toy \
        --config.model.path=PIPELINE --config.data.dir=FOLDER \
        --config.data.subject.prompt="<toy>" \
        --config.objective.adapter="textual_inversion('<toy>', init='toy', vectors=1)"
    python main.py --mode=generate --config.model.path=PIPELINE \
        --config.adapters=runs/toy/adapter.safetensors --config.samples.prompt="a <toy> on a beach"

FOLDER holds three to ten pictures. Each step puts the word into one of 27 sentences about a thing;
``--config.data.template=style`` has 19 about a style. Nothing but the word's rows is trained.

Hardware: as configs/finetune_lora.py; not yet run at full size.
"""

from ml_collections import ConfigDict

from configs import finetune_lora


def get_config() -> ConfigDict:
    c = finetune_lora.get_config()
    c.data.name = "subject"
    c.data.size = 512
    c.data.template = "object"
    c.objective.label_dropout = 0.0
    c.optimizer.learning_rate = 2e-3
    c.optimizer.weight_decay = 0.0
    c.train.steps = 3000
    return c
