"""CLIP score, R-precision and diversity: closed forms, ties, chance and pairs."""

import jax
import numpy as np
import pytest

from diffusion.evaluation.metrics import caption_similarity, clip_score, diversity
from diffusion.evaluation.metrics.metric import Judged
from diffusion.evaluation.networks.lpips import lpips
from diffusion.evaluation.networks.network import Network
from diffusion.evaluation.sets import of_arrays
from diffusion.models.lpips import LPIPS
from diffusion.pretrained import files, weights
from diffusion.pretrained.networks.lpips import NAMES

TWO = Network("two", lambda: None, ("features", "text"))


def judged(samples, network, real=None):
    return Judged(samples, lambda name: real, network)


def test_clip_score_of_known_angles():
    angles = np.array([0, np.pi / 3, np.pi / 2, np.pi])
    pictures = 3 * np.stack([np.cos(angles), np.sin(angles)], 1)
    samples = of_arrays("x", {"features": pictures, "text": np.tile([[2.0, 0.0]], (4, 1))})
    found = clip_score.metric(TWO).measure(judged(samples, TWO))
    scores = np.array([100, 50, 0, 0])
    assert found["clip_score_two"] == pytest.approx(scores.mean(), abs=1e-10)
    error = scores.std(ddof=1) / 2
    assert found["clip_score_two_ci"] == pytest.approx(1.959964 * error, abs=1e-9)
    assert found["clip_cosine_two"] == pytest.approx((1 + 0.5 + 0 - 1) / 4, abs=1e-12)


def test_an_embedding_without_direction_is_refused():
    with pytest.raises(ValueError, match="has no direction"):
        clip_score.cosines(np.zeros((1, 3)), np.ones((1, 3)))


def test_r_precision_is_one_for_own_captions_and_chance_for_random_ones():
    rng = np.random.default_rng(0)
    texts, names = rng.normal(size=(2000, 32)), [f"caption {i}" for i in range(2000)]
    samples = of_arrays("x", {"features": texts, "text": texts}, names)
    found = clip_score.r_precision(TWO, 9).measure(judged(samples, TWO))
    assert found["r_precision_two"] == 1 and found["r_precision_chance_two"] == 0.1
    # Unit vectors, so that no caption is near to all pictures because of its length.
    random = of_arrays("x", {"features": rng.normal(size=(2000, 32)), "text": texts}, names)
    found = clip_score.r_precision(TWO, 9).measure(judged(random, TWO))
    assert found["r_precision_two"] == pytest.approx(0.1, abs=4 * np.sqrt(0.09 / 2000))


def test_r_precision_does_not_depend_on_the_lengths_of_embeddings():
    rng = np.random.default_rng(1)
    texts, pictures = rng.normal(size=(50, 4)), rng.normal(size=(50, 4))
    names = [str(i) for i in range(50)]
    long = texts * np.exp(rng.normal(size=(50, 1)))
    hits = [clip_score.retrieved(pictures, x, names, negatives=5) for x in (texts, long)]
    np.testing.assert_array_equal(*hits)
    assert 0 < hits[0].mean() < 1


def test_equal_captions_are_never_negatives_and_ties_are_shared():
    texts = np.eye(4)[[0, 0, 1, 2]]
    hits = clip_score.retrieved(texts, texts, ["a", "a", "b", "c"], negatives=2)
    np.testing.assert_array_equal(hits, 1)
    same = np.ones((3, 2))
    hits = clip_score.retrieved(same, same, ["a", "b", "c"], negatives=2)
    np.testing.assert_allclose(hits, 1 / 3)
    with pytest.raises(ValueError, match="3 different ones, so at most 2"):
        clip_score.retrieved(same, same, ["a", "b", "c"], negatives=3)


def test_pairs_are_disjoint_of_one_subject_and_bounded():
    subjects = np.random.default_rng(0).integers(0, 5, 101).tolist()
    found = diversity.pairs(subjects, 101, 1000, 0)
    assert len(set(found.ravel())) == found.size
    assert all(subjects[i] == subjects[j] for i, j in found)
    counts = np.bincount(subjects)
    assert len(found) == (counts // 2).sum()
    assert len(diversity.pairs(subjects, 101, 7, 0)) == 7
    assert len(diversity.pairs((), 9, 1000, 0)) == 4


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    x, rng = jax.ShapeDtypeStruct((1, 16, 16, 3), np.float32), np.random.default_rng(0)

    def drawn(leaf):  # the last layers' weights are not negative
        values = rng.standard_normal(leaf.shape, np.float32) / np.sqrt(np.prod(leaf.shape[:-1]))
        return abs(values) if leaf.shape[-1] == 1 else values

    params = jax.tree.map(drawn, jax.eval_shape(LPIPS().init, jax.random.key(0), x, x)["params"])
    path = tmp_path_factory.mktemp("lpips") / "lpips.safetensors"
    files.write_file(path, weights.save_params(NAMES, params))
    return lpips(str(path))


def test_diversity_is_zero_for_copies_and_the_distance_of_pairs(network):
    rng = np.random.default_rng(0)
    copies = np.repeat(rng.integers(0, 256, (2, 16, 16, 3), np.uint8), 2, axis=0)
    others = rng.integers(0, 256, (5, 16, 16, 3), np.uint8)
    labels = [3, 3, 8, 8]
    samples, real = (
        of_arrays(name, network(x, s, ("pictures",)), s)
        for name, x, s in (("x", copies, labels), ("real", others, [1, 2, 1, 4, 5]))
    )
    found = diversity.metric(network).measure(judged(samples, network, real))
    assert found["diversity_lpips"] == pytest.approx(0, abs=1e-9)
    assert found["diversity_pairs_lpips"] == 2
    from diffusion.pretrained.networks.lpips import load

    params = load(network.files[0])
    pair = (others[[i]] / np.float32(127.5) - 1 for i in (0, 2))
    expected = LPIPS().apply({"params": params}, *pair)[0]
    assert found["diversity_lpips_real"] == pytest.approx(float(expected), rel=1e-5)
    assert found["diversity_pairs_lpips_real"] == 1 and expected > 0


def test_diversity_needs_two_of_a_subject_and_lpips(network):
    x = np.zeros((2, 16, 16, 3), np.uint8)
    samples = of_arrays("x", {"pictures": x}, ["a", "b"])
    with pytest.raises(ValueError, match="no two of the 2 examples of x have one subject"):
        diversity.metric(network).measure(judged(samples, network, samples))
    with pytest.raises(ValueError, match='needs lpips\\("FILE"\\), got the network two'):
        diversity.metric(TWO)


def test_many_captions_with_one_embedding_are_found_by_chance():
    rng = np.random.default_rng(0)
    texts = np.tile(rng.normal(size=(1, 512)), (200, 1))
    names = [str(i) for i in range(200)]
    hits = clip_score.retrieved(rng.normal(size=(200, 512)), texts, names, negatives=99)
    np.testing.assert_allclose(hits, 0.01)


def test_r_precision_needs_captions():
    x = np.ones((3, 2))
    for captions in ([], [None] * 3):
        with pytest.raises(ValueError, match="needs the caption of each picture"):
            clip_score.retrieved(x, x, captions, negatives=1)


def test_caption_similarity_is_the_cosine_of_the_nearest_pictures_caption():
    angles = {"a": 0.0, "b": np.pi / 3, "c": np.pi}

    def encode(_, texts):
        return {"text": np.array([[np.cos(angles[t]), np.sin(angles[t])] for t in texts])}

    encoder = Network("words", lambda: encode, ("text",), pictures=False)
    place = Network("place", lambda: None)
    real = of_arrays("real", {"features": np.array([[0.0], [1.0], [10.0]])}, ["a", "b", "c"])
    # The nearest real pictures have the captions b, c and a.
    samples = of_arrays("x", {"features": np.array([[1.2], [9.0], [-3.0]])}, ["a", "c", "a"])
    found = caption_similarity.metric(encoder, place).measure(judged(samples, place, real))
    name = "caption_similarity_words_place"
    assert found[name] == pytest.approx((0.5 + 1 + 1) / 3)
    # Of real pictures: a beside b, b beside a, c beside b.
    assert found[f"{name}_real"] == pytest.approx((0.5 + 0.5 - 0.5) / 3)
    own, known = np.array([0, np.pi, 0]), np.array(list(angles.values()))
    chance = np.cos(own[:, None] - known[None]).mean()
    assert found[f"{name}_chance"] == pytest.approx(chance)
    assert found[f"{name}_ci"] > 0
    numbers = of_arrays("x", {"features": np.zeros((2, 1))}, [1, 2])
    with pytest.raises(ValueError, match="needs a caption of each example; x has none"):
        caption_similarity.metric(encoder, place).measure(judged(numbers, place, real))
    with pytest.raises(ValueError, match=r"needs a network of texts, .*got place"):
        caption_similarity.metric(place)
