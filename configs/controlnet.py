"""Trains a ControlNet: pictures that follow edges, or other maps (Zhang et al., 2023).

    python main.py --config=configs/controlnet.py --workdir=runs/edges \
        --config.model.path=PIPELINE --config.data.dir=PAIRS.npz
    python main.py --mode=generate --config.model.path=PIPELINE --config.samples.prompt="a house" \
        --config.control="canny(net='runs/edges', image='x.png', scale=0.8)"
    python main.py --config=configs/controlnet.py --workdir=runs/digits_edges \
        --config.model.path=runs/digits --config.data.name=digits --config.data.size=0 \
        --config.data.hint="soft_edges(sigma=0)" --config.objective.adapter="controlnet((16,))"

The net's ``hint_widths`` have one entry more than pixels are halved to what the network sees: four
for Stable Diffusion's latents, one for pixels. ``--config.data.name=edits`` with
``--config.data.hint=given`` takes maps of your own, as the pictures before an edit.

Hardware: as configs/finetune_lora.py; not yet run at full size.
"""

from ml_collections import ConfigDict

from configs import finetune_lora


def get_config() -> ConfigDict:
    c = finetune_lora.get_config()
    c.data.size = 512
    c.data.hint = "canny(low=100, high=200)"
    c.objective.adapter = "controlnet((16, 32, 96, 256))"
    c.objective.label_dropout = 0.5  # prompts that are left out make the hint count
    c.optimizer.learning_rate = 1e-5
    c.train.steps = 10_000
    return c
