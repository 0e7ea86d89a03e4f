"""Which signals are dropped: exact shares, and what lies on each other."""

import jax.numpy as jnp
import numpy as np
import pytest

from configs import instruct_pix2pix, ip_adapter
from diffusion.conditioning import Conditioning, ImagePrompt, null_like
from diffusion.config import objective
from diffusion.objectives import dropout

RATE = 0.05
U = (jnp.arange(400) + 0.5) / 400  # 20 examples for each 5 %


def conditioning():
    """Text and pictures of ones, and their null, zeros."""
    ones = jnp.ones((len(U), 2))
    cond = Conditioning(
        context=ones, image=ones[:, :, None, None], image_prompts=(ImagePrompt(features=ones),)
    )
    return cond, null_like(cond, context=0.0, image=0.0, image_features=0.0)


def dropped(kind, rate=RATE):
    """(text, picture, image prompt) [400] bool: which of them the network does not see."""
    left = kind(*conditioning(), U, rate)
    signals = left.context, left.image, left.image_prompts[0].features
    flat = [np.asarray(s).reshape(len(U), -1) for s in signals]
    assert all(np.all((f == 0) | (f == 1)) and np.all(f == f[:, :1]) for f in flat)
    return [f[:, 0] == 0 for f in flat]


def spans(*parts):
    """[400] bool of the shares (from, to) in multiples of the rate."""
    return np.any([(a * RATE <= np.asarray(U)) & (np.asarray(U) < b * RATE) for a, b in parts], 0)


def test_instruct_drops_text_then_both_then_the_picture():
    text, picture, prompt = dropped(dropout.instruct)
    np.testing.assert_array_equal(text, spans((0, 2)))
    np.testing.assert_array_equal(picture, spans((1, 3)))
    assert (text & ~picture).sum() == (text & picture).sum() == (picture & ~text).sum() == 20
    assert prompt.sum() == text.sum()


def test_image_prompt_drops_the_picture_then_the_text_then_both():
    text, _, prompt = dropped(dropout.image_prompt)
    np.testing.assert_array_equal(prompt, spans((0, 1), (2, 3)))
    np.testing.assert_array_equal(text, spans((1, 3)))


def test_together_drops_all_at_once():
    for part in dropped(dropout.together):
        np.testing.assert_array_equal(part, spans((0, 1)))
    assert dropout.together(*conditioning(), U, 0.0).context.all()


@pytest.mark.parametrize("kind", [dropout.instruct, dropout.image_prompt])
def test_three_shares_are_at_most_everything(kind):
    with pytest.raises(ValueError, match=r"rate must lie in \[0, 0\.333333\], got 0\.4"):
        dropped(kind, 0.4)


@pytest.mark.parametrize(
    ("experiment", "signal"), [(instruct_pix2pix, "image"), (ip_adapter, "image_features")]
)
def test_label_dropout_is_the_rate_of_the_experiments(experiment, signal):
    config = experiment.get_config()
    assert objective.dropout(config, {signal}).keywords == {"rate": RATE}
    config.objective.label_dropout = 0.2
    assert objective.dropout(config, {signal}).keywords == {"rate": 0.2}
