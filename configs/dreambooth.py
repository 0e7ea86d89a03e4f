"""Teaches a model one subject in a few pictures: DreamBooth (Ruiz et al., 2023).

    python main.py --config=configs/dreambooth.py --workdir=runs/dog \
        --config.model.path=PIPELINE --config.data.dir=FOLDER \
        --config.data.subject.prompt="a photo of sks dog" \
        --config.data.subject.class_dir=DOGS --config.data.subject.class_prompt="a photo of a dog"

FOLDER holds three to ten pictures of the subject. Half of each batch is of DOGS, pictures of its
class, which the model draws before training until there are 200, so that it does not forget what
other dogs look like. Without class_dir and with ``--config.objective.terms="()"`` there are none.

``--config.objective.adapter="full()"`` trains the whole network and its text encoders instead of a
LoRA, ``"full('image/')"`` the network alone, with ``--config.optimizer.learning_rate=2e-6``.

Hardware: as configs/finetune_lora.py; not yet run at full size.
"""

from ml_collections import ConfigDict

from configs import finetune_lora


def get_config() -> ConfigDict:
    c = finetune_lora.get_config()
    c.data.name = "subject"
    c.data.size = 512
    c.objective.terms = ("prior_preservation()",)
    c.objective.label_dropout = 0.0
    c.train.steps = 500
    c.train.batch_size = 2
    c.train.sample_every = 100
    return c
