"""Textual inversion: files, words in prompts, training of rows."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_pipelines as tiny
import torch
from safetensors.numpy import load_file, save_file

from diffusion import pipelines
from diffusion.denoiser import thousand_t
from diffusion.models.clip import ClipText
from diffusion.models.mlp import MLP
from diffusion.models.text_to_image import TextToImage
from diffusion.pipelines import adapted, adapters, concepts, joint
from diffusion.pipelines.conditioners import Captions
from diffusion.pipelines.pipeline import Pipeline
from diffusion.pipelines.prompts import _chunks, split
from diffusion.predictions import flow
from diffusion.pretrained.adapters import embeddings
from diffusion.pretrained.adapters.embeddings import Word
from diffusion.schedules import RectifiedFlow

REAL = Path(__file__).parents[3] / "shared/data/weights/textual_inversion_disney_sd15.safetensors"
rng = np.random.default_rng(0)


@pytest.fixture(scope="module", params=["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
def both(request, tmp_path_factory):
    """diffusers' pipeline, and ours opened."""
    folder = tmp_path_factory.mktemp("tiny")
    theirs = tiny.whole(request.param, folder)
    return theirs, pipelines.open_any(folder)


def rows(opened, count=2):
    encoders = opened.pipeline.conditioner.encoders
    return tuple(rng.normal(size=(count, e.width)).astype(np.float32) for e in encoders)


def test_words_are_found_at_their_bounds():
    assert split("a cat on a cathedral", ["cat"]) == [
        ("a ", None), ("cat", "cat"), (" on a cathedral", None),
    ]  # fmt: skip
    assert split("<a><a-b>x", ["<a>", "<a-b>"]) == [("<a>", "<a>"), ("<a-b>", "<a-b>"), ("x", None)]
    assert split("anything", []) == [("anything", None)]
    for word, text in (("_toy", "my_toy"), ("toy_", "toy_s"), ("v1.5", "v1.55")):
        assert split(text, [word]) == [(text, None)]


def test_a_word_may_have_dots(tmp_path):
    """Tensors of layers have some too, and are no words."""
    rows = np.ones((2, 4), np.float32)
    save_file({"<v1.5>": rows}, tmp_path / "word.safetensors")
    assert embeddings.holds(tmp_path / "word.safetensors")
    for key in ("a.lora_A.weight", "lora_unet_x.alpha", "x.hada_w1_a", "x.diff", "x.bias"):
        save_file({key: rows, f"b.{key}": rows}, tmp_path / "layers.safetensors")
        assert not embeddings.holds(tmp_path / "layers.safetensors"), key


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_files_there_and_back_to_the_bit(tmp_path, layout):
    word = Word("<s>", (rng.normal(size=(3, 8)).astype(np.float32),))
    embeddings.write(tmp_path / "x.safetensors", [word], layout)
    assert embeddings.holds(tmp_path / "x.safetensors")
    (found,) = embeddings.read(tmp_path / "x.safetensors", "" if layout == "diffusers" else "<s>")
    assert found.token == "<s>"
    np.testing.assert_array_equal(found.rows[0], word.rows[0])


def test_pairs_and_several_words(tmp_path):
    pair = Word("mine", (np.ones((2, 4), np.float32), np.ones((2, 6), np.float32)))
    embeddings.write(tmp_path / "mine.safetensors", [pair])
    assert set(load_file(tmp_path / "mine.safetensors")) == {"clip_l", "clip_g"}
    assert embeddings.read(tmp_path / "mine.safetensors")[0].token == "mine"
    for token, layout in (("<toy>", "diffusers"), ("<b>", "kohya")):  # called otherwise
        own = pair if layout == "diffusers" else pair._replace(rows=pair.rows[:1])
        embeddings.write(tmp_path / "x.safetensors", [own._replace(token=token)], layout)
        assert embeddings.read(tmp_path / "x.safetensors")[0].token == token
    save_file(
        {"<a>": np.ones(4, np.float16), "<b>": np.ones((2, 4), np.float32)},
        tmp_path / "two.safetensors",
    )
    found = embeddings.read(tmp_path / "two.safetensors")
    assert {word.token: word.rows[0].shape for word in found} == {"<a>": (1, 4), "<b>": (2, 4)}
    with pytest.raises(ValueError, match="several words"):
        embeddings.read(tmp_path / "two.safetensors", "<c>")


def test_encoded_as_transformers_does(both, tmp_path):
    """The rows stand where the word's placeholders do, in a table to which they were added."""
    theirs, opened = both
    own = rows(opened)
    made = opened.attach(concepts.Concept(Word("<s>", own)))
    params = made.load()
    cond, _ = made.pipeline.conditioner(params, ["a <s> cat"], "blurry")
    contexts = []
    sdxl = made.pipeline.conditioner.sdxl
    names = ("", "_2")[: len(own)]
    for name, table in zip(names, own):
        tokenizer, encoder = (
            getattr(theirs, f"{part}{name}") for part in ("tokenizer", "text_encoder")
        )
        length, count = tokenizer.model_max_length, encoder.config.vocab_size
        before, after = (tokenizer(t, add_special_tokens=False).input_ids for t in ("a", "cat"))
        ids = [tokenizer.bos_token_id, *before, count, count + 1, *after, tokenizer.eos_token_id]
        ids += [tokenizer.pad_token_id] * (length - len(ids))
        embedding = encoder.get_input_embeddings()
        old = embedding.weight
        embedding.weight = torch.nn.Parameter(torch.cat([old, torch.tensor(table)]))
        with torch.no_grad():
            out = encoder(torch.tensor([ids]), output_hidden_states=True)
        embedding.weight = old
        contexts.append(out.hidden_states[-2] if sdxl else out.last_hidden_state)
    expected = torch.cat(contexts, -1).numpy()
    np.testing.assert_allclose(cond.context, expected, atol=1e-4)
    plain, _ = opened.pipeline.conditioner(opened.load(), ["a <s> cat"], "blurry")
    assert np.abs(plain.context - cond.context).max() > 1e-2
    # Prompts without the word are what they were, also where the end is found.
    old, _ = opened.pipeline.conditioner(opened.load(), ["a cat"], "blurry")
    new, _ = made.pipeline.conditioner(params, ["a cat"], "blurry")
    jax.tree.map(np.testing.assert_array_equal, old, new)


def test_a_word_stays_whole_where_a_chunk_ends(both):
    _, opened = both
    conditioner = opened.pipeline.conditioner.with_word("<s>", 4)
    inside = conditioner.encoders[0].length - 2
    text = "a " * (inside - 2) + "<s>"
    made = _chunks(
        conditioner.tokenizers[0],
        conditioner.encoders[0],
        text,
        False,
        None,
        conditioner.own_words(0),
    )
    first = conditioner.words[0][1][0]
    assert len(made.ids) == 2 and made.ids[1, 1:5].tolist() == list(range(first, first + 4))


def test_brackets_of_a_word_are_no_weights(both):
    _, opened = both
    conditioner = opened.pipeline.conditioner.with_word("[V]", 1)
    encoder, tokenizer = conditioner.encoders[0], conditioner.tokenizers[0]
    made = {
        text: _chunks(tokenizer, encoder, text, True, None, conditioner.own_words(0))
        for text in ("a [V] cat", r"a \[V\] cat", "a ([V]:1.5) [cat]")
    }
    number = conditioner.words[0][1][0]
    for text, chunks in made.items():
        assert chunks.ids[0, 2] == number, text
        weights = (1.5, 1 / 1.1) if "1.5" in text else (1, 1)
        np.testing.assert_allclose(chunks.weights[0, 2:4], weights, err_msg=text)


def test_by_spec_with_mistakes(both, tmp_path):
    _, opened = both
    own = rows(opened, 1)
    word = Word("thing", own)
    file = tmp_path / "thing.safetensors"
    embeddings.write(file, [word])
    made = adapters.attach(opened, f"{file}(token='<t>')" if len(own) > 1 else str(file))
    token = "<t>" if len(own) > 1 else "thing"
    assert concepts.known_words(made.pipeline) == (token,)
    with pytest.raises(ValueError, match=f"new words, {token}, have no place"):
        pipelines.save_pretrained(tmp_path / "saved", made.pipeline, {})
    folder = tmp_path / "folder"  # such as a repository of one word on the hub
    folder.mkdir()
    embeddings.write(folder / "learned_embeds.safetensors", [word])
    found = adapters.attach(opened, str(folder)).pipeline
    assert concepts.known_words(found) == ("thing",)
    with pytest.raises(ValueError, match=r"knows '.*' already"):
        adapters.attach(made, f"{file}(token='<t>')" if len(own) > 1 else str(file))
    wrong = Word("w", tuple(r[:, :-1] for r in own))
    embeddings.write(tmp_path / "wrong.safetensors", [wrong])
    with pytest.raises(ValueError, match=r"was made for .*those of this model have"):
        adapters.attach(opened, str(tmp_path / "wrong.safetensors"))
    embeddings.write(tmp_path / "nan.safetensors", [Word("n", tuple(r * np.nan for r in own))])
    with pytest.raises(ValueError, match="not finite"):
        adapters.attach(opened, str(tmp_path / "nan.safetensors"))
    (tmp_path / "old.pt").write_bytes(b"x")
    with pytest.raises(ValueError, match="refused"):
        embeddings.read(tmp_path / "old.pt")


def test_only_the_rows_learn(both):
    _, opened = both
    base = opened.pipeline
    adapter = adapted.adapter("textual_inversion('<s>', init='a', vectors=2)", base)
    frozen = joint.params(base, opened.load())
    own = adapter.init(jax.random.key(0), frozen)
    table = frozen["text"]["encoders_0"]["embeddings"]["token_embedding"]["embedding"]
    number = base.conditioner.tokenizers[0]("a", add_special_tokens=False).input_ids[0]
    np.testing.assert_array_equal(own["0"], np.repeat(table[number][None], 2, 0))
    merged = adapter.merge(frozen, own)
    network = adapter.network(joint.network(base))
    shapes = jax.tree.map(jnp.shape, merged["text"])
    conditioner = adapter.conditioner(base.conditioner, base.network)
    ids = jnp.asarray(joint.encode(conditioner, ["a <s> sea"])["tokens"])
    expected = jax.eval_shape(network.text.init, jax.random.key(0), ids)["params"]
    assert shapes == jax.tree.map(jnp.shape, expected)

    def loss(own):
        text = adapter.merge(frozen, own)["text"]
        return (network.text.apply({"params": text}, ids).last ** 2).mean()

    grads = jax.jit(jax.grad(loss))(own)
    assert all(np.abs(g).max() > 0 for g in grads.values()) and set(grads) == set(own)
    assert [r.shape for r in adapter.word(own).rows] == [r.shape for r in rows(opened)]


WORDS = ("", "<start>", "a", "cat", "red", "sea", "<end>")  # 0 is any other


def encode(captions):
    """Six tokens of each caption, as a run with a vocabulary of its own numbers them."""
    rows, masks = [], []
    for caption in captions:
        inside = [WORDS.index(w) if w in WORDS else 0 for w in caption.split()][:4]
        row = [1, *inside, 6]
        masks.append([i < len(row) for i in range(6)])
        rows.append([*row, *[6] * (6 - len(row))])
    return {"tokens": np.array(rows, np.int32), "context_mask": np.array(masks)}


def test_a_run_with_a_text_encoder_of_its_own():
    """The word's number is the largest, and the end is found all the same."""
    text = ClipText(vocab_size=7, width=8, depth=1, heads=2, hidden=8, length=6)
    net = TextToImage(text, MLP())
    pipeline = replace(opened_points(), network=net, conditioner=Captions(encode))
    word = Word("<s>", (rng.normal(size=(2, 8)).astype(np.float32),))
    ids = jnp.asarray(encode(["a cat"])["tokens"])
    params = {"text": text.init(jax.random.key(0), ids)["params"], "image": {}}
    concept = concepts.Concept(word)
    made, own = concept.pipeline(pipeline), concept.load({"network": params})["network"]
    out = made.conditioner.encode(["a <s> cat", "red sea", "", "a <s> red sea cat"])
    assert out["tokens"].tolist() == [
        [1, 2, 7, 8, 3, 6], [1, 4, 5, 6, 6, 6], [1, 6, 6, 6, 6, 6], [1, 2, 7, 8, 4, 6],
    ]  # fmt: skip
    assert out["context_mask"].sum(1).tolist() == [6, 4, 2, 6]
    encoded = made.network.text.apply({"params": own["text"]}, out["tokens"], out["context_mask"])
    np.testing.assert_array_equal(encoded.pooled[0], encoded.last[0, 5])
    old = text.apply({"params": params["text"]}, *encode(["red sea"]).values())
    np.testing.assert_array_equal(encoded.last[1], old.last[0])
    assert concepts.known_words(made) == ("<s>",)
    two = concepts.Concept(word._replace(token="<t>")).pipeline(made)
    tokens = two.conditioner.encode(["<t> <s>"])["tokens"][0]
    assert tokens.tolist() == [1, 9, 10, 7, 8, 6]
    trained = adapted.adapter("textual_inversion('<u>', 'cat')", made)
    assert (trained.start, trained.end) == ((3,), (6,))
    with pytest.raises(ValueError, match="unknown to the text encoder"):
        adapted.adapter("textual_inversion('<u>', 'dog')", made)


def opened_points():
    """A pipeline to replace parts of."""
    return Pipeline("run", MLP(), RectifiedFlow(), flow, thousand_t, (2,))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("textual_inversion('<s>')", "needs init"),
        ("textual_inversion('<s>', 'catastrophically strange')", "tokens; choose a common word"),
        ("textual_inversion(' ', 'cat')", "does not know yet"),
        ("textual_inversion('<s>', 'cat', vectors=0)", "vectors"),
    ],
)
def test_mistakes_in_training(both, spec, expected):
    with pytest.raises(ValueError, match=expected):
        adapted.adapter(spec, both[1].pipeline)


@pytest.mark.skipif(not REAL.exists(), reason="the real embeddings are not here")
def test_real_words_fit_stable_diffusion(both):
    words = embeddings.read(REAL)
    assert [w.token for w in words] == ["<s1>", "<s2>"]
    assert {w.rows[0].shape for w in words} == {(1, 768)}
    _, opened = both
    conditioner = opened.pipeline.conditioner
    wide = replace(
        conditioner,
        encoders=(conditioner.encoders[0].clone(width=768),),
        tokenizers=conditioner.tokenizers[:1],
    )
    concepts.check(replace(opened.pipeline, conditioner=wide), words[0], "file")
