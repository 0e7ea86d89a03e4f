"""Pictures as prompts against diffusers' pipelines, and what specs ask for."""


import numpy as np
import pytest
import tiny_ip_adapters as tiny_ip
import tiny_pipelines as tiny
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_encoders import VISION, clip_vision
from transformers import CLIPImageProcessor

from diffusion.pipelines import load
from diffusion.pipelines.generation import Generation
from diffusion.pipelines.request import Request
from diffusion.sampling.sample import image_keys, image_noise

RNG = np.random.default_rng(0)
NOISE = np.asarray(image_noise(image_keys(0, range(1)), (8, 8, 4)))
PROMPT = "a photo of a cat"
REQUEST = {"steps": 4, "guidance": ("cfg(3)",), "solver": "DDIMScheduler"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures, a mask, an image encoder and a face's embedding."""
    at = tmp_path_factory.mktemp("prompts")
    for name, size in (("a", (40, 30)), ("b", (25, 33)), ("c", (24, 24))):
        pixels = RNG.integers(0, 256, (*size[::-1], 3), np.uint8)
        Image.fromarray(pixels).resize(size, Image.BICUBIC).save(at / f"{name}.png")
    mask = np.zeros((16, 16), np.uint8)
    mask[3:12, :7] = 255
    Image.fromarray(mask).save(at / "mask.png")
    Image.fromarray(255 - mask).save(at / "rest.png")
    np.save(at / "face.npy", RNG.normal(size=(2, tiny_ip.FACE)).astype(np.float32))
    clip_vision().save_pretrained(at / "encoder")
    return at


def pipelines(kind, at, kinds):
    """(theirs with adapters of these kinds, ours, our parameters, their files)."""
    theirs = tiny.whole(kind, at / kind)
    states = [tiny_ip.adapter(theirs.unet, name, seed) for seed, name in enumerate(kinds)]
    paths = []
    for name, state in zip(kinds, states):
        paths.append(str(at / f"{kind}-{name}.safetensors"))
        save_file(state, paths[-1])
    theirs.register_modules(
        image_encoder=clip_vision(),
        feature_extractor=CLIPImageProcessor(
            size=VISION["image_size"], crop_size=VISION["image_size"]
        ),
    )
    names = [path.rsplit("/", 1)[1] for path in paths]
    theirs.load_ip_adapter(str(at), subfolder="", weight_name=names, image_encoder_folder=None)
    return theirs, *load(at / kind), paths


def drawn(pipeline, params, specs, **changes):
    request = Request(**REQUEST | {"image_prompts": specs} | changes)
    return next(Generation(pipeline, [PROMPT], request).pictures(params))[1]


def their_picture(theirs, **given):
    with torch.no_grad():
        return tiny.numpy_image(
            theirs(
                PROMPT,
                num_inference_steps=4,
                guidance_scale=3.0,
                height=16,
                width=16,
                latents=tiny.torch_image(NOISE),
                output_type="np",
                **given,
            ).images
        )[0]


def masks(at, *names):
    """As diffusers takes them: [1, images, H, W]."""
    found = [np.asarray(Image.open(at / name), np.float32) / 255 for name in names]
    return torch.from_numpy(np.stack(found)[None])


@pytest.mark.filterwarnings("ignore")
def test_two_adapters_of_two_pictures(folder):
    """Base and Plus; the second with factors by block and a mask for each of its pictures."""
    at = str(folder)
    kind, kinds = "StableDiffusionPipeline", ("base", "plus")
    theirs, pipeline, params, (base, plus) = pipelines(kind, folder, kinds)
    blocks = {"down": {"block_0": [0.9]}, "up": {"block_1": [0.0, 1.3]}}
    theirs.set_ip_adapter_scale([0.7, blocks])
    images = [[Image.open(folder / f"{n}.png") for n in names] for names in ("ab", "bc")]
    whole = torch.ones(1, 2, 16, 16)
    expected = their_picture(
        theirs,
        ip_adapter_image=images,
        cross_attention_kwargs={"ip_adapter_masks": [whole, masks(folder, "mask.png", "rest.png")]},
    )
    Image.fromarray(np.full((16, 16), 255, np.uint8)).save(folder / "white.png")
    encoder = f"encoder='{at}/encoder'"
    specs = (
        f"ip_adapter('{base}', image=('{at}/a.png', '{at}/b.png'), scale=0.7, {encoder},"
        f" mask=('{at}/white.png', '{at}/white.png'))",
        f"ip_adapter('{plus}', image=('{at}/b.png', '{at}/c.png'), {encoder}, blocks={blocks},"
        f" mask=('{at}/mask.png', '{at}/rest.png'))",
    )
    ours = drawn(pipeline, params, specs)
    np.testing.assert_allclose(ours, expected, atol=1e-3)
    assert np.abs(ours - drawn(pipeline, params, ())).max() > 0.05


@pytest.mark.filterwarnings("ignore")
def test_faces_and_patches_on_sdxl(folder):
    """Two embeddings of a face with the LoRA of their file; full-face; joined tokens."""
    at = str(folder)
    kind, kinds = "StableDiffusionXLPipeline", ("face", "full")
    theirs, pipeline, params, (face, full) = pipelines(kind, folder, kinds)
    theirs.set_ip_adapter_scale([0.8, 0.5])
    faces = torch.from_numpy(np.load(folder / "face.npy"))[None]
    image = Image.open(folder / "a.png")
    found, null = theirs.encode_image(image, "cpu", 1, True)
    embeds = [torch.cat([0 * faces, faces]), torch.stack([null, found])]
    expected = their_picture(theirs, ip_adapter_image_embeds=embeds)
    specs = (
        f"ip_adapter('{face}', embeddings='{at}/face.npy', scale=0.8)",
        f"ip_adapter('{full}', '{at}/a.png', 0.5, encoder='{at}/encoder')",
    )
    ours = drawn(pipeline, params, specs)
    np.testing.assert_allclose(ours, expected, atol=1e-3)
