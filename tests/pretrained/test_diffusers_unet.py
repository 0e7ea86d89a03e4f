"""Against diffusers' UNet2DModel and UNet2DConditionModel: outputs, names, shapes, configs."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from diffusion.conditioning import Conditioning
from diffusion.models.unet import UNet
from diffusion.pretrained import unet
from diffusion.pretrained.names import bind, from_tensors, to_tensors
from tests.pretrained.unet_cases import PUBLISHED, SMALL

torch.set_num_threads(1)


def randomised(model):
    """Every parameter random, outputs of order one."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.data = noise / parameter[0].numel() ** 0.5
        else:
            parameter.data = 0.3 * noise + float(parameter.data.mean() == 1)  # norms' weights
    return model.eval()


def shapes(net: UNet):
    return jax.eval_shape(net.init, jax.random.key(0), *unet.example(net))["params"]


def theirs(config):
    return getattr(diffusers, config["_class_name"]).from_config(config)


def inputs(net):
    """Arguments of our network, and the same as keyword arguments of theirs; batch of two."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=(2, *shape)).astype(np.float32)

    time, x = np.array([999.0, 3.5], np.float32), normal(8, 8, net.in_channels)
    channels = min(net.in_channels, 4)  # the others come as cond.image
    ours, other = {}, {}
    if net.attends_to_context:
        ours["context"] = other["encoder_hidden_states"] = normal(7, net.context_width)
    if net.num_classes is not None:
        ours["label"] = other["class_labels"] = np.array([1, 2])
    if net.guidance_width is not None:
        ours["guidance"] = np.array([1.0, 8.5], np.float32)
        embed = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding
        other["timestep_cond"] = embed(
            None, torch.tensor(ours["guidance"] - 1), embedding_dim=net.guidance_width
        ).numpy()
    if net.added_embedding:
        count = (net.added_width - 10) // net.time_id_width
        ours["pooled"], ours["time_ids"] = normal(10), 500 + 200 * normal(count)
        other["added_cond_kwargs"] = {
            "text_embeds": torch.tensor(ours["pooled"]),
            "time_ids": torch.tensor(ours["time_ids"]),
        }
    if net.in_channels > channels:
        ours["image"] = x[..., channels:]
    other = {k: torch.tensor(v) if isinstance(v, np.ndarray) else v for k, v in other.items()}
    other |= {"sample": torch.tensor(x).permute(0, 3, 1, 2), "timestep": torch.tensor(time)}
    cond = Conditioning(**jax.tree.map(jnp.asarray, ours))
    return (jnp.asarray(x[..., :channels]), jnp.asarray(time), cond), other


@pytest.mark.parametrize("name", SMALL)
def test_outputs_are_those_of_diffusers(name):
    model = randomised(theirs(SMALL[name]))
    net = unet.from_config(model.config)
    params = from_tensors(unet.names(net), shapes(net), model.state_dict())
    args, other = inputs(net)
    ours = jax.jit(net.apply)({"params": params}, *args)
    with torch.no_grad():
        expected = model(**other).sample.permute(0, 2, 3, 1)
    assert 0.3 < expected.std() < 10
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    # And back, into the network that they make of our config.
    again = theirs(unet.to_config(net))
    tensors = {k: torch.tensor(v) for k, v in to_tensors(unet.names(net), params)}
    again.load_state_dict(tensors)
    with torch.no_grad():
        same = again.eval()(**other).sample.permute(0, 2, 3, 1)
    np.testing.assert_array_equal(same, expected)
    assert unet.from_config(again.config) == net


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_of_the_published(name):
    config, parameters, tensors = PUBLISHED[name]
    with torch.device("meta"):
        expected = {k: tuple(v.shape) for k, v in theirs(config).state_dict().items()}
    net = unet.from_config(config)
    matches = bind(unet.names(net), shapes(net))
    assert {key: s for m in matches for key, s in zip(m.theirs, m.shapes)} == expected
    assert sum(int(np.prod(shape)) for shape in expected.values()) == parameters
    assert tensors in (None, len(expected))
