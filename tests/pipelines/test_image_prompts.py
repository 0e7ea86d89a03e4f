"""Pictures as prompts against diffusers' pipelines, and what specs ask for."""

import re

import jax
import numpy as np
import pytest
import tiny_ip_adapters as tiny_ip
import tiny_pipelines as tiny
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_encoders import VISION, clip_vision
from transformers import CLIPImageProcessor

from diffusion.models.ip_adapter import block_factors, cross_attentions
from diffusion.models.unet import sdxl
from diffusion.pipelines import image_prompts, load
from diffusion.pipelines.generation import Generation
from diffusion.pipelines.request import Request
from diffusion.sampling.sample import image_keys, image_noise

RNG = np.random.default_rng(0)
NOISE = np.asarray(image_noise(image_keys(0, range(1)), (8, 8, 4)))
PROMPT = "a photo of a cat"
compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
)
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
    side = VISION["image_size"]
    theirs.register_modules(
        image_encoder=clip_vision(),
        feature_extractor=CLIPImageProcessor(size=side, crop_size=side),
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


@pytest.fixture(scope="module")
def small(folder):
    """(our tiny pipeline, its parameters, a spec of the base kind without its other options)."""
    theirs = tiny.whole(folder=folder / "small")
    for kind in tiny_ip.KINDS:
        save_file(tiny_ip.adapter(theirs.unet, kind), folder / f"{kind}.safetensors")
    return *load(folder / "small"), f"ip_adapter('{folder}/base.safetensors'"


@pytest.mark.filterwarnings("ignore")
def test_other_pictures_scales_and_masks_do_not_compile_again(folder, small):
    """And scale 0 leaves the picture as it is without the adapter, to the bit."""
    pipeline, params, spec = small
    spec += f", encoder='{folder}/encoder', image='{folder}/"
    first = drawn(pipeline, params, f"{spec}a.png', scale=0.5, mask='{folder}/mask.png')")
    compiled.clear()
    others = [("b", 0.5, "mask"), ("a", 1.4, "mask"), ("a", 0.5, "rest")]
    for image, scale, mask in others:
        other = drawn(
            pipeline, params, f"{spec}{image}.png', scale={scale}, mask='{folder}/{mask}.png')"
        )
        assert np.abs(other - first).max() > 1e-3, (image, scale, mask)
    block = f"{spec}a.png', blocks={{'up': 1}}, mask='{folder}/mask.png')"
    assert np.abs(drawn(pipeline, params, block) - first).max() > 1e-3
    off = drawn(pipeline, params, f"{spec}a.png', scale=0, mask='{folder}/mask.png')")
    assert not compiled
    np.testing.assert_array_equal(off, drawn(pipeline, params, ()))


@pytest.mark.filterwarnings("ignore")
def test_with_perturbed_attention_feature_caches_and_batches(folder, small):
    """What else intercepts the network leaves the adapter at work; picture i is the same alone."""
    pipeline, params, spec = small
    spec += f", encoder='{folder}/encoder', image='{folder}/a.png')"
    how = {"guidance": ("cfg(3)", "perturbed_attention(2)"), "steps": 2}
    how["acceleration"] = ("cache(every(2), keep=1)",)
    request = Request(**REQUEST | how | {"image_prompts": spec, "batch_size": 2})
    generation = Generation(pipeline, [PROMPT, "a dog"], request)
    found = [picture for _, picture in generation.pictures(params)]
    plain = drawn(pipeline, params, (), **how)
    assert np.abs(found[0] - plain).max() > 1e-3 and np.abs(found[0] - found[1]).max() > 1e-3
    np.testing.assert_allclose(found[0], drawn(pipeline, params, spec, **how), atol=1e-4)


def test_blocks_of_sdxl_and_others(small):
    net = small[0].network
    np.testing.assert_array_equal(block_factors(net, "all"), np.ones(4))
    mixed = {"down": 0.5, "mid": 2, "up": {"block_1": (0, 3)}}
    np.testing.assert_array_equal(block_factors(net, mixed), [0.5, 0, 3, 2])
    xl = sdxl()
    sites = cross_attentions(xl)
    for name, block in (("style", "up_blocks_0"), ("layout", "down_blocks_2")):
        expected = [site.path.startswith(f"{block}/attentions_1/") for site in sites]
        assert sum(expected) == 10
        np.testing.assert_array_equal(block_factors(xl, name), expected)


@pytest.mark.parametrize(
    "options, message",
    [
        ("image='{}/a.png'", r"takes features of an image encoder: give its folder, encoder="),
        ("encoder='{}/encoder'", 'expected either image="x.png" or embeddings'),
        ("image='{}/no.png', encoder='{}/encoder'", r"image='.*no\.png': no such picture"),
        ("image='{}/a.png', encoder='{}/small'", r"encoder='.*small': .*holds a pipeline"),
        ("image='{}/a.png', encoder='{}/encoder', scale='x'", "expected float"),
        ("image='{}/a.png', encoder='{}/encoder', scale=inf", "scale must be a finite number"),
        ("image='{}/a.png', encoder='{}/encoder', lora=0.5", "lora=0.5 has no effect: .* no LoRA"),
        ("image='{}/a.png', encoder='{}/encoder', blocks='styles'", "Did you mean 'style'"),
        ("image='{}/a.png', encoder='{}/encoder', blocks='style'", "known of SDXL alone"),
        ("image='{}/a.png', encoder='{}/encoder', blocks={{'middle': 1}}", "Did you mean 'mid'"),
        ("image='{}/a.png', encoder='{}/encoder', blocks={{'up': {{'block_0': 1}}}}", "'block_1'"),
        ("image='{}/a.png', encoder='{}/encoder', blocks={{'up': (1,)}}", "has 2 attentions"),
        ("image='{}/a.png', encoder='{}/encoder', blocks={{'up': True}}", "expected numbers"),
        ("image='{}/a.png', encoder='{}/encoder', blocks={{'mid': {{'x': 1}}}}", "is one block"),
        ("image='', encoder='{}/encoder'", "expected either image="),
        ("image='{}/a.png', encoder='{}/encoder', mask=('{}/a.png',) * 2", "expected a name"),
        ("image='{}/a.png', encoder='{}/encoder', mask=('{}/a.png', '{}/a.png')", "2 masks for 1"),
        ("embeddings='{}/face.npy'", r"holds float32 \(2, 20\); expected floats \[24\]"),
        ("embeddings='{}/none.npy'", "no such file"),
        ("embeddings='{}/face.npy', encoder='{}/encoder'", "encoder=.* has no effect: embeddings"),
    ],
)
def test_mistakes_are_found_before_weights_are_read(folder, small, options, message):
    pipeline, _, spec = small
    text = f"{spec}, {options.format(*[folder] * 4)})"
    with pytest.raises(ValueError if "no such" not in message else FileNotFoundError) as caught:
        Generation(pipeline, [PROMPT], Request(image_prompts=text))
    assert re.search(message, str(caught.value)), caught.value
    assert str(caught.value).startswith("config.image_prompts")


def test_faces_and_patches_say_what_they_take(folder, small):
    pipeline = small[0]

    def make(spec):
        return image_prompts.make(pipeline, None, spec.replace("@", str(folder)), (16, 16))

    with pytest.raises(ValueError, match=r"embedding of a face .* 20 numbers"):
        make("ip_adapter('@/face.safetensors', '@/a.png', encoder='@/encoder')")
    with pytest.raises(ValueError, match=r"expected floats \[2, images, patches, 32\]"):
        make("ip_adapter('@/plus.safetensors', embeddings='@/face.npy')")
    np.save(folder / "patches.npy", RNG.normal(size=(2, 3, 10, 32)).astype(np.float32))
    (made,) = make("ip_adapter('@/plus.safetensors', embeddings='@/patches.npy')")
    assert [a.shape for a in made.features] == [(3, 10, 32)] * 2
    clip_vision(projection_dim=12).save_pretrained(folder / "narrow")
    with pytest.raises(ValueError, match=r"takes features of 24 numbers, .* gives 12; published"):
        make("ip_adapter('@/base.safetensors', '@/a.png', encoder='@/narrow')")
    assert make("") == []
