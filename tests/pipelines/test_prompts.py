"""Prompts to conditioning, against diffusers' pipelines and by what must hold."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_encoders
import torch
import transformers
from tiny_tokenizer import tiny_tokenizer

from diffusion.pipelines.prompts import Prompts
from diffusion.pipelines.tokenizers import clip_tokenizer, load_tokenizer
from diffusion.pretrained.names import from_tensors
from diffusion.pretrained.networks import clip

torch.set_num_threads(1)

MERGES = Path(__file__).resolve().parents[3] / "shared/data/tokenizer/bpe_simple_vocab_16e6.txt.gz"
LONG = " ".join(["a red cat and a small blue house on a green mountain at night,"] * 7)
SHORT = ["a photo of a cat", "painting of a big dog (running) near [water]!"]


def made(tokenizers, refiner=False, zeros=True):
    """(conditioner, params, the torch encoders): SD's for one tokenizer, SDXL's for two."""
    depth = len(tokenizers) + 1
    small = {"num_hidden_layers": depth, "vocab_size": len(tokenizers[0])}
    kinds = [{}, {"projection": True, "hidden_act": "gelu", "hidden_size": 24}]
    if refiner:
        kinds = kinds[1:]
    models = [tiny_encoders.clip_text(i, **small, **k) for i, k in enumerate(kinds)]
    models = models[: len(tokenizers)]
    encoders, params = [], []
    for model in models:
        config = model.config.to_dict() | {"architectures": [type(model).__name__]}
        encoder = clip.from_config(config)
        shapes = jax.eval_shape(encoder.init, jax.random.key(0), *clip.example(encoder))
        encoders.append(encoder)
        params.append(from_tensors(clip.names(encoder), shapes["params"], model.state_dict()))
    return Prompts(tuple(encoders), tuple(tokenizers), zeros), {"encoders": params}, models


def theirs(conditioner, models, *prompts, **options):
    """diffusers' embeddings: prompts', negatives', and for SDXL these of the pooled ones."""
    cls, names = diffusers.StableDiffusionPipeline, ["", "_2"]
    config = SimpleNamespace(force_zeros_for_empty_prompt=conditioner.zeros)
    if conditioner.sdxl:
        cls, names = diffusers.StableDiffusionXLPipeline, names[-len(models) :]
    else:
        object.__setattr__(models[0], "text_model", models[0])  # as in transformers 4
    own = SimpleNamespace(config=config, unet=None, text_encoder=None, tokenizer=None)
    for name, tokenizer, model in zip(names, conditioner.tokenizers, models):
        setattr(own, f"tokenizer{name}", tokenizer)
        setattr(own, f"text_encoder{name}", model)
    arguments = dict(device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    with torch.no_grad():
        return cls.encode_prompt(own, *prompts, **arguments | options)


@pytest.fixture(scope="module")
def sd():
    return made([tiny_tokenizer()])


@pytest.fixture(scope="module")
def sdxl():
    return made([tiny_tokenizer(), tiny_tokenizer(pad="!")])


def check(ours, wanted):
    cond, null = ours
    assert cond.context_mask is None
    pairs = [(cond.context, wanted[0]), (null.context, wanted[1])]
    if len(wanted) == 4:
        pairs += [(cond.pooled, wanted[2]), (null.pooled, wanted[3])]
    else:
        assert cond.pooled is None and null.pooled is None
    for a, b in pairs:
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=1e-4)
    assert wanted[0].std() > 0.1


@pytest.mark.parametrize(
    "negative, skip", [(None, None), (["ugly", "blurry, on a river"], 1), (["", "a"], 0)]
)
def test_stable_diffusion_is_diffusers(sd, negative, skip):
    conditioner, params, models = sd
    twice, both = np.repeat(SHORT, 2).tolist(), negative and np.repeat(negative, 2).tolist()
    ours = conditioner(params, twice, both, clip_skip=skip or 0)
    wanted = theirs(
        conditioner,
        models,
        SHORT,
        negative_prompt=negative,
        num_images_per_prompt=2,
        clip_skip=skip,
    )
    check(ours, wanted)


@pytest.mark.parametrize("negative, skip", [(None, None), ("ugly", 1), ("", None)])
def test_sdxl_is_diffusers(sdxl, negative, skip):
    conditioner, params, models = sdxl
    ours = conditioner(params, SHORT, negative, clip_skip=skip or 0)
    listed = None if negative is None else [negative] * 2
    check(ours, theirs(conditioner, models, SHORT, negative_prompt=listed, clip_skip=skip))
    assert (np.abs(ours[1].context).max() == 0) == (negative is None)


def test_sdxl_with_other_texts_for_the_second_encoder(sdxl):
    conditioner, params, models = sdxl
    ours = conditioner(params, SHORT, "ugly", second="a red dog", second_negative="blurry")
    wanted = theirs(
        conditioner, models, SHORT, ["a red dog"] * 2, negative_prompt=["ugly"] * 2,
        negative_prompt_2=["blurry"] * 2,
    )  # fmt: skip
    check(ours, wanted)


def test_the_refiner_is_diffusers():
    conditioner, params, models = made([tiny_tokenizer(pad="!")], refiner=True, zeros=False)
    check(conditioner(params, SHORT), theirs(conditioner, models, SHORT))


def test_clips_own_vocabulary():
    if not MERGES.exists():
        pytest.skip(f"needs {MERGES.name}, CLIP's merges")
    conditioner, params, models = made([clip_tokenizer(MERGES)])
    text = ["An astronaut riding a horse, 8k; naïve café 你好 🙂 isn't", "x" * 90 + " y" * 90]
    with pytest.warns(UserWarning, match="cut off after 75; left out: 'y y y"):
        ours = conditioner(params, text, "low quality!", max_chunks=1)
    check(ours, theirs(conditioner, models, text, negative_prompt=["low quality!"] * 2))


def test_what_is_too_long_is_cut_off_as_diffusers_does(sd):
    conditioner, params, models = sd
    with pytest.warns(UserWarning, match="left out: '.*a green mountain at night ,'"):
        ours = conditioner(params, ["a cat", LONG], max_chunks=1)
    check(ours, theirs(conditioner, models, ["a cat", LONG]))


def test_long_prompts_are_chunks_next_to_each_other(sd, sdxl):
    conditioner, params, _ = sd
    words = LONG.split()
    ids = conditioner.tokenizers[0](LONG, add_special_tokens=False).input_ids
    assert 75 < len(ids) < 150
    cond, null = conditioner(params, LONG)
    assert cond.context.shape == null.context.shape == (1, 154, 32)
    # Cut between the same tokens, the parts give the same.
    first, second = (conditioner.tokenizers[0].decode(ids[a:b]) for a, b in [(0, 75), (75, 150)])
    assert len((first + " " + second).split()) >= len(words)
    parts, empty = conditioner(params, [first, second])
    np.testing.assert_allclose(cond.context[0], parts.context.reshape(154, 32), atol=1e-5)
    np.testing.assert_allclose(null.context[0], empty.context.reshape(154, 32), atol=1e-5)
    assert cond.context_mask is None

    conditioner, params, _ = sdxl
    cond, null = conditioner(params, "a cat", LONG)
    alone, plain = conditioner(params, ["a cat", ""], first)
    both = alone.context.reshape(1, 154, -1)
    np.testing.assert_allclose(cond.context, both, atol=1e-5)
    np.testing.assert_allclose(cond.pooled, alone.pooled[:1], atol=1e-5)
    np.testing.assert_allclose(null.pooled, plain.pooled[:1], atol=1e-5)


def test_what_else_is_in_the_batch_does_not_matter(sd):
    conditioner, params, _ = sd
    both = conditioner(params, ["a (cat:1.3)", LONG], weighted=True)
    for mixed, alone in zip(both, conditioner(params, "a (cat:1.3)", weighted=True)):
        np.testing.assert_array_equal(mixed.context_mask.sum(1), [77, 154])
        np.testing.assert_allclose(mixed.context[0, :77], alone.context[0], atol=1e-5)
        assert mixed.context_mask[0, :77].all() and alone.context_mask is None
    several = conditioner(params, ["cat", "dog"], [LONG, "ugly"])
    np.testing.assert_array_equal(several[0].context_mask.sum(1), [154, 77])


def test_weights(sd):
    conditioner, params, _ = sd
    plain, null = conditioner(params, "a red cat", "ugly")
    same = conditioner(params, "a (red:1.0) cat", "[(ugly)]", weighted=True)
    jax.tree.map(np.testing.assert_array_equal, (plain, null), same)
    cond, _ = conditioner(params, "a (red:1.5) cat", "ugly", weighted=True)
    ratio = np.asarray(cond.context / plain.context)[0]
    np.testing.assert_allclose(ratio / ratio[0, 0], np.where(np.arange(77) == 2, 1.5, 1)[:, None]
                               * np.ones(32), rtol=1e-4)  # fmt: skip
    np.testing.assert_allclose(cond.context.mean(), plain.context.mean(), rtol=1e-4)
    literal, _ = conditioner(params, "a (red:1.5) cat")
    assert np.abs(literal.context - plain.context).max() > 0.1


def test_compiled_once(sd):
    from diffusion.pipelines import prompts

    conditioner, params, _ = sd
    conditioner(params, SHORT, "ugly")
    before = prompts._encode._cache_size()
    changed = jax.tree.map(lambda a: a + 1, params)
    conditioner(changed, ["a (dog:1.2)", "cat"], "blurry", weighted=True)
    assert prompts._encode._cache_size() == before


def test_half_precision(sdxl):
    conditioner, params, _ = sdxl
    low = [encoder.clone(dtype=jnp.bfloat16) for encoder in conditioner.encoders]
    half = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), params)
    changed = replace(conditioner, encoders=tuple(low))
    cond, null = jax.eval_shape(lambda p: changed(p, SHORT), half)
    assert {a.dtype for a in jax.tree.leaves((cond, null))} == {jnp.dtype(jnp.bfloat16)}


def test_errors(sd):
    conditioner, params, _ = sd

    def refused(message, *args, conditioner=conditioner, **options):
        with pytest.raises(ValueError, match=message):
            conditioner(params, *args, **options)

    refused("no prompts", [])
    refused("negative: 1 texts for 2 prompts", SHORT, ["ugly"])
    refused("clip_skip=2; expected 0 to 1 of 2", SHORT, clip_skip=2)
    refused("max_chunks=0; expected at least 1", SHORT, max_chunks=0)
    small = [encoder.clone(vocab_size=100) for encoder in conditioner.encoders]
    wrong = replace(conditioner, encoders=tuple(small))
    refused("do not belong together", SHORT, conditioner=wrong)
    with pytest.raises(ValueError, match="takes prompts, which are texts, got 3"):
        conditioner.check(3)


def test_folders_of_older_and_of_other_tokenizers(tmp_path):
    made = tiny_tokenizer(tmp_path / "new")
    (tmp_path / "old").mkdir()
    made.backend_tokenizer.model.save(str(tmp_path / "old"))
    config = '{"model_max_length": 77, "tokenizer_class": "CLIPTokenizer", "pad_token": "!"}'
    (tmp_path / "old" / "tokenizer_config.json").write_text(config)
    old = load_tokenizer(tmp_path / "old")
    assert old(LONG).input_ids == made(LONG).input_ids
    assert (old.pad_token_id, old.model_max_length) == (0, 77)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁cat", -1.0), ("s", -2.0)]
    transformers.T5Tokenizer(vocab=pieces, extra_ids=0).save_pretrained(tmp_path / "t5")
    t5 = load_tokenizer(tmp_path / "t5")
    assert t5("cats", padding="max_length", max_length=5).input_ids == [3, 4, 1, 0, 0]


def test_break_begins_a_chunk(sd):
    conditioner, params, _ = sd
    apart, _ = conditioner(params, ["a red", "cat"])
    cond, null = conditioner(params, "a red BREAK cat")
    assert cond.context.shape == null.context.shape == (1, 154, 32)
    np.testing.assert_allclose(cond.context.reshape(2, 77, 32), apart.context, atol=1e-5)
    weights = conditioner(params, "(a red BREAK cat:1.0)", weighted=True)[0]
    np.testing.assert_array_equal(weights.context, cond.context)


def test_emphasis_by_model(sd, sdxl):
    for (conditioner, params, _), usual in ((sd, "mean"), (sdxl, "norm")):
        made = {
            name: conditioner(params, "a (red:1.5) cat", weighted=True, emphasis=name)[0].context
            for name in ("auto", "none", "mean", "norm")
        }
        np.testing.assert_array_equal(made["auto"], made[usual])
        assert all(np.abs(made[n] - made["none"]).max() > 1e-3 for n in ("mean", "norm"))
        with pytest.raises(ValueError, match=r"emphasis: unknown 'men'.*'mean'"):
            conditioner(params, "a cat", emphasis="men")
    with pytest.raises(ValueError, match="AND, of several"):
        sd[0](sd[1], "a cat", "bad AND ugly")
