"""Against diffusers' DiTTransformer2DModel: outputs, names, shapes, configs."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from diffusion.conditioning import Conditioning
from diffusion.models.dit import DiT
from diffusion.pretrained.names import bind, from_tensors, to_tensors
from diffusion.pretrained.networks import dit

torch.set_num_threads(1)

NAME = {"_class_name": "DiTTransformer2DModel"}
XL2 = {**NAME, "out_channels": 8, "sample_size": 32}
SMALL = {
    "learned variances": {
        **{
            **NAME,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "sample_size": 8,
        },
        **{"in_channels": 4, "out_channels": 8, "num_embeds_ada_norm": 5, "dropout": 0.1},
    },
    "large patches": {
        **{
            **NAME,
            "num_attention_heads": 3,
            "attention_head_dim": 8,
            "num_layers": 1,
            "sample_size": 16,
        },
        **{"in_channels": 3, "patch_size": 4, "num_embeds_ada_norm": 5, "norm_eps": 1e-2},
    },
}


def theirs(config):
    """Every parameter random, embedders of all blocks equal."""
    model = diffusers.DiTTransformer2DModel.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
        parameter.data = scale * noise
    for block in model.transformer_blocks[1:]:
        block.norm1.emb = model.transformer_blocks[0].norm1.emb
    return model


def shapes(net: DiT):
    return jax.eval_shape(net.init, jax.random.key(0), *dit.example(net))["params"]


@pytest.mark.parametrize("name", SMALL)
def test_outputs_are_those_of_diffusers(name):
    model = theirs(SMALL[name])
    net = dit.from_config(SMALL[name])
    params = from_tensors(dit.names(net), shapes(net), model.state_dict())
    apply, rng = jax.jit(net.apply), np.random.default_rng(0)
    # Positions are stretched when the image is not of the size that the network was made for.
    for size in (net.image_size, net.image_size // 2):
        x = rng.normal(size=(2, size, size, net.in_channels)).astype(np.float32)
        time, label = np.array([999, 3]), np.array([1, 5])
        cond = Conditioning(label=jnp.asarray(label))
        ours = apply({"params": params}, jnp.asarray(x), jnp.asarray(time), cond)
        with torch.no_grad():
            out = model(
                torch.tensor(x).permute(0, 3, 1, 2), torch.tensor(time), torch.tensor(label)
            )
        assert 0.3 < out.sample.std() < 10
        np.testing.assert_allclose(ours, out.sample.permute(0, 2, 3, 1), atol=1e-4)
    again = diffusers.DiTTransformer2DModel.from_config(dit.to_config(net)).eval()
    assert dit.from_config({**NAME, **again.config}) == net
    back = dict(to_tensors(dit.names(net), params))
    assert back.keys() == again.state_dict().keys()
    for key, tensor in model.state_dict().items():
        np.testing.assert_array_equal(back[key], tensor)


def test_embedders_of_the_blocks_must_be_equal():
    config = SMALL["learned variances"]
    net, tensors = dit.from_config(config), dict(theirs(config).state_dict())
    key = "transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"
    tensors[key] = tensors[key] + 1
    with pytest.raises(ValueError, match="2 tensors that should be copies of each other"):
        from_tensors(dit.names(net), shapes(net), tensors)


def test_names_and_shapes_of_the_published():
    with torch.device("meta"):
        model = diffusers.DiTTransformer2DModel.from_config(XL2)
    net = dit.from_config(XL2)
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    matches = bind(dit.names(net), shapes(net))
    assert {key: s for m in matches for key, s in zip(m.theirs, m.shapes)} == expected
    assert len(expected) == 538
    assert sum(int(np.prod(shape)) for shape in expected.values()) == 749_826_464


def test_former_class_name():
    config = {
        **{"_class_name": "Transformer2DModel", "attention_head_dim": 72, "attention_bias": True},
        **{"activation_fn": "gelu-approximate", "cross_attention_dim": None, "in_channels": 4},
        **{"norm_elementwise_affine": False, "norm_type": "ada_norm_zero", "num_layers": 28},
        **{"num_embeds_ada_norm": 1000, "out_channels": 8, "patch_size": 2, "sample_size": 32},
    }
    assert dit.from_config(config) == dit.from_config(XL2)
    with pytest.raises(ValueError, match="norm_type='layer_norm'"):
        dit.from_config({k: v for k, v in config.items() if k != "norm_type"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_type": "ada_norm"}, "norm_type='ada_norm': .* 'ada_norm_zero'"),
        ({"attention_bias": False}, "attention_bias=False"),
        ({"out_channels": 5}, "out_channels=5.*in_channels=4 or twice"),
        ({"num_layer": 3}, "num_layer=3: .* did you mean 'num_layers'"),
        ({"_class_name": "PixArtTransformer2DModel"}, "expected one of DiTTransformer2DModel"),
        ({"num_embeds_ada_norm": None}, "num_embeds_ada_norm=None"),
    ],
)
def test_what_is_not_supported_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dit.from_config({**XL2, **change})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm": "rms"}, "norm='rms': DiTTransformer2DModel has layer"),
        ({"time_freq_shift": 0.0}, "time_freq_shift=0.0"),
        ({"image_size": None}, "image_size=None"),
        ({"num_classes": 0}, "num_classes=0"),
    ],
)
def test_networks_that_diffusers_does_not_have(fields, message):
    net = dit.from_config(XL2)
    with pytest.raises(ValueError, match=message):
        dit.to_config(net.clone(**fields))
    with pytest.raises(ValueError, match="unstack_blocks"):
        dit.names(net.clone(scan=True))
