"""Against transformers' CLIP and T5 encoders: outputs, names, shapes, configs, initial values."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_encoders
import torch
import transformers

from diffusion.models.t5 import buckets
from diffusion.pretrained.folders import TRANSFORMERS, open_folder, write_folder, write_json
from diffusion.pretrained.names import from_tensors, to_tensors
from diffusion.pretrained.networks import clip, dinov2, t5
from diffusion.pretrained.weights import load_params, save_params

torch.set_num_threads(1)

LENGTH, END = 13, 999
CASES = {
    "text": (tiny_encoders.clip_text, {}),
    "text, projection": (tiny_encoders.clip_text, {"projection": True, "hidden_act": "gelu"}),
    "text, other end": (
        tiny_encoders.clip_text,
        {"eos_token_id": END - 5, "num_hidden_layers": 2, "layer_norm_eps": 1e-3},
    ),
    "text, other end, projection": (
        tiny_encoders.clip_text,
        {"projection": True, "eos_token_id": 7, "hidden_size": 24, "projection_dim": 40},
    ),
    "vision": (tiny_encoders.clip_vision, {}),
    "vision, gelu": (tiny_encoders.clip_vision, {"hidden_act": "gelu", "patch_size": 6}),
    "dinov2": (tiny_encoders.dinov2, {}),
    "dinov2, swiglu, other size": (tiny_encoders.dinov2, {"use_swiglu_ffn": True}),
    "t5": (tiny_encoders.t5, {}),
    "t5 v1.1": (tiny_encoders.t5, {"feed_forward_proj": "gated-gelu", "num_layers": 3}),
}


def module_of(model):
    if isinstance(model, transformers.Dinov2Model):
        return dinov2
    return t5 if isinstance(model, transformers.T5EncoderModel) else clip


def shapes(module, net):
    return jax.eval_shape(net.init, jax.random.key(0), *module.example(net))["params"]


def inputs(net):
    rng = np.random.default_rng(0)
    if isinstance(net, dinov2.DinoV2):
        sides = (40, 32) if net.swiglu else (net.size, net.size)
        return (rng.normal(size=(2, *sides, 3)).astype(np.float32),)
    if isinstance(net, clip.ClipVision):
        return (rng.normal(size=(2, net.size, net.size, 3)).astype(np.float32),)
    ids = rng.integers(8, 90, (3, LENGTH))
    if isinstance(net, t5.T5Encoder):
        return ids, np.arange(LENGTH) < np.array([[LENGTH], [4], [1]])
    end = END if net.end is None else net.end
    ids[0, 4:] = end  # padding as in SD 1
    ids[1, 5], ids[1, 6:] = end, 0  # as in SD 2
    ids[2, -1] = end
    return (ids,)


def outputs(model, arguments):
    """transformers' outputs, under our names."""
    tensors = [torch.as_tensor(a) for a in arguments]
    with torch.no_grad():
        if isinstance(model, transformers.T5EncoderModel):
            return {"": model(tensors[0], attention_mask=tensors[1].long()).last_hidden_state}
        if isinstance(model, transformers.Dinov2Model):
            return {"": model(tensors[0].movedim(-1, 1)).last_hidden_state}
        vision = isinstance(model, transformers.CLIPVisionModelWithProjection)
        tensors = [tensors[0].movedim(-1, 1) if vision else tensors[0]]
        out = model(*tensors, output_hidden_states=True)
    named = {"last": out.last_hidden_state, "hidden": out.hidden_states}
    if vision:
        return named | {"projected": out.image_embeds}
    if hasattr(out, "text_embeds"):
        return named | {"projected": out.text_embeds}
    return named | {"pooled": out.pooler_output}


@pytest.mark.parametrize("case", CASES)
def test_folders_in_and_out_and_outputs(case, tmp_path):
    build, changes = CASES[case]
    model = build(**changes)
    module = module_of(model)
    model.save_pretrained(tmp_path / "theirs")
    net = module.from_config(json.loads((tmp_path / "theirs" / "config.json").read_text()))
    names, expected = module.names(net), shapes(module, net)
    params = load_params(names, expected, open_folder(tmp_path / "theirs"))

    arguments = inputs(net)
    ours = jax.jit(net.apply)({"params": params}, *arguments)
    ours = ours._asdict() if hasattr(ours, "_asdict") else {"": ours}
    for name, theirs in outputs(model, arguments).items():
        for a, b in zip(jax.tree.leaves(ours[name]), jax.tree.leaves(theirs), strict=True):
            assert 0.1 < b.std() < 10
            np.testing.assert_allclose(a, b, atol=1e-4, err_msg=name)

    config = module.to_config(net)
    assert module.from_config(config) == net
    write_folder(tmp_path / "ours", TRANSFORMERS, save_params(names, params))
    write_json(tmp_path / "ours" / "config.json", config)
    again, info = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    for key, value in model.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[key], value, err_msg=key)
    again.save_pretrained(tmp_path / "again")
    returned = load_params(names, expected, open_folder(tmp_path / "again"))
    jax.tree.map(np.testing.assert_array_equal, returned, params)


OPENCLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
PUBLISHED = {
    "CLIP ViT-L/14 text": (
        transformers.CLIPTextModel,
        {
            **{"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
            **{"eos_token_id": 2, "projection_dim": 768},
        },
        123_060_480,
    ),
    "OpenCLIP ViT-H text": (
        transformers.CLIPTextModel,
        {**OPENCLIP_H, "num_hidden_layers": 23, "hidden_act": "gelu", "projection_dim": 512},
        340_387_840,
    ),
    "OpenCLIP bigG text": (
        transformers.CLIPTextModelWithProjection,
        {
            **{"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20},
            **{"num_hidden_layers": 32, "hidden_act": "gelu", "projection_dim": 1280},
        },
        694_659_840,
    ),
    "OpenCLIP ViT-H vision": (
        transformers.CLIPVisionModelWithProjection,
        {
            **{"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 16},
            **{"num_hidden_layers": 32, "hidden_act": "gelu", "projection_dim": 1024},
            "patch_size": 14,
        },
        632_076_800,
    ),
    "T5 v1.1 XXL encoder": (
        transformers.T5EncoderModel,
        {
            **{"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64},
            "feed_forward_proj": "gated-gelu",
        },
        4_762_310_656,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    cls, config, parameters = PUBLISHED[name]
    with torch.device("meta"):
        theirs = cls._from_config(cls.config_class(**config)).state_dict()
    module = t5 if "T5" in name else clip
    net = module.from_config({**config, "architectures": [cls.__name__]})
    ours = shapes(module, net)
    assert sum(p.size for p in jax.tree.leaves(ours)) == parameters
    hollow = jax.tree.map(lambda p: np.broadcast_to(np.int8(0), p.shape), ours)
    written = {k: v.shape for k, v in to_tensors(module.names(net), hollow)}
    if cls is transformers.CLIPTextModel:  # which transformers 5 writes without, and reads with
        theirs = {f"text_model.{key}": value for key, value in theirs.items()}
    theirs.pop("encoder.embed_tokens.weight", None)  # not written: shared.weight is the same
    assert written == {key: tuple(value.shape) for key, value in theirs.items()}


def test_spellings_of_keys():
    def check(model, module, *others):
        net = module.from_config(model.config.to_dict() | {"architectures": [type(model).__name__]})
        names, expected = module.names(net), shapes(module, net)
        tensors = {key: value.numpy() for key, value in model.state_dict().items()}
        params = from_tensors(names, expected, tensors)
        for change in others:
            changed = change(tensors)
            assert changed.keys() != tensors.keys()
            read = from_tensors(names, expected, changed)
            jax.tree.map(np.testing.assert_array_equal, read, params)
        with pytest.raises(ValueError, match=r"1 unexpected: .*surprise"):
            from_tensors(names, expected, tensors | {"surprise.weight": np.zeros(3)})

    positions = np.arange(77)[None]
    check(
        tiny_encoders.clip_text(),
        clip,
        lambda tensors: {f"text_model.{k}": v for k, v in tensors.items()},
        lambda tensors: tensors | {"embeddings.position_ids": positions},
        lambda tensors: tensors | {"text_model.embeddings.position_ids": positions},
    )
    check(
        tiny_encoders.clip_vision(),
        clip,
        lambda tensors: tensors | {"vision_model.embeddings.position_ids": positions},
        lambda tensors: {k.removeprefix("vision_model."): v for k, v in tensors.items()},
    )

    def only(tensors, *keys):
        return {k: v for k, v in tensors.items() if k not in keys}

    check(
        tiny_encoders.t5(),
        t5,
        lambda tensors: only(tensors, "encoder.embed_tokens.weight"),
        lambda tensors: only(tensors, "shared.weight"),
        lambda tensors: tensors | {"decoder.block.0.a": positions, "lm_head.weight": positions},
    )


SD15 = {
    "_name_or_path": "openai/clip-vit-large-patch14",
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "torch_dtype": "float32",
    "transformers_version": "4.22.0.dev0",
    "vocab_size": 49408,
}
VISION = {"architectures": ["CLIPVisionModelWithProjection"]}
T5 = {"architectures": ["T5ForConditionalGeneration"], "feed_forward_proj": "gated-gelu"}


def test_configs_of_the_hub():
    net = clip.from_config(SD15)
    assert net == clip.ClipText(width=768, heads=12, hidden=3072)
    assert (
        clip.from_config({**SD15, "_class_name": "CLIPTextModelWithProjection"}).projection == 768
    )
    assert t5.from_config({**T5, "dense_act_fn": "gelu_new", "n_positions": 512}).gated


@pytest.mark.parametrize(
    "config, message",
    [
        ({**SD15, "hidden_act": "relu"}, "hidden_act='relu': .*'quick_gelu', 'gelu'"),
        ({**SD15, "hiden_size": 8}, "hiden_size=8: .* did you mean 'hidden_size'"),
        ({**SD15, "architectures": ["ClapModel"]}, r"architectures=\['ClapModel'\]: expected"),
        ({**SD15, "use_attention_mask": True}, "use_attention_mask=True"),
        ({**SD15, "eos_token_id": [2, 3]}, r"eos_token_id=\(2, 3\).*a number"),
        ({**VISION, "image_size": [224, 192]}, "image_size=.*squares"),
        ({**T5, "feed_forward_proj": "gated-silu"}, "feed_forward_proj='gated-silu': .*'relu'"),
        ({**T5, "dense_act_fn": "relu"}, "dense_act_fn='relu': .*'gelu_new'"),
        ({**T5, "is_decoder": True}, "is_decoder=True"),
        ({"_class_name": "T5Stack"}, "_class_name='T5Stack': expected one of T5EncoderModel"),
    ],
)
def test_unsupported_configs_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        (t5 if "T5" in str(config) else clip).from_config(config)


@pytest.mark.parametrize(
    "model",
    [
        tiny_encoders.clip_text(projection=True, num_hidden_layers=2),
        tiny_encoders.clip_vision(num_hidden_layers=1),
        tiny_encoders.t5(num_layers=1, feed_forward_proj="gated-gelu"),
    ],
    ids=["text", "vision", "t5"],
)
def test_initial_values_are_like_theirs(model):
    torch.manual_seed(0)
    theirs = type(model)._from_config(model.config).state_dict()
    module, name = module_of(model), type(model).__name__
    net = module.from_config(model.config.to_dict() | {"architectures": [name]})
    params = jax.jit(net.init)(jax.random.key(0), *map(jnp.asarray, inputs(net)))["params"]
    for key, ours in to_tensors(module.names(net), params):
        wanted = theirs[key].numpy()
        if wanted.std() == 0:
            np.testing.assert_array_equal(ours, wanted, err_msg=key)
        else:
            # Five standard errors of the ratio of two deviations.
            assert abs(np.log(ours.std() / wanted.std())) < 5 / wanted.size**0.5, key
            assert abs(ours.mean()) < 5 * wanted.std() / wanted.size**0.5, key


@pytest.mark.parametrize("count, furthest", [(32, 128), (8, 12), (64, 1000)])
def test_position_buckets(count, furthest):
    positions = torch.arange(600)
    theirs = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket(
        positions[None] - positions[:, None], True, count, furthest
    )
    np.testing.assert_array_equal(buckets(600, count, furthest), theirs)
