"""Pictures that follow maps: against diffusers' pipelines, and what does not compile again."""

import inspect

import diffusers
import jax
import numpy as np
import pytest
import tiny_pipelines as tiny
import torch
from PIL import Image
from tiny_encoders import randomise

from diffusion.models.t2i_adapter import T2IAdapter
from diffusion.pipelines import samplers
from diffusion.pipelines.codec import POSTERIOR, folded
from diffusion.pipelines.condition_maps import CHOICES
from diffusion.pipelines.control import check_effects, interval
from diffusion.pipelines.control_nets import Net
from diffusion.pipelines.from_pretrained import open_pipeline
from diffusion.pipelines.generation import Generation
from diffusion.pipelines.request import Request
from diffusion.pipelines.tasks import MASKED
from diffusion.sampling.sample import image_keys, image_noise

PROMPT, NEGATIVE, TOLERANCE = "a photo of a cat", "ugly", 1e-3
KEYS = image_keys(0, [0])
NOISE = np.asarray(image_noise(KEYS, (8, 8, 4)))
SIZE = tiny.SIZE
RNG = np.random.default_rng(0)
MAPS = RNG.integers(0, 256, (3, SIZE, SIZE, 3)).astype(np.uint8)
MASK = np.zeros((SIZE, SIZE), np.uint8)
MASK[3:11, 2:9] = 255


def controlnet(unet, seed=11, **fields):
    net = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16))
    if fields:
        net = diffusers.ControlNetModel.from_config({**net.config, **fields})
    return randomise(net, seed)


class Models:
    """A tiny pipeline and nets for it, theirs, and ours from the folders where they are saved."""

    def __init__(self, folder, kind="StableDiffusionPipeline"):
        self.folder = folder
        self.theirs = tiny.whole(kind, folder / "base")
        unet = self.theirs.unet
        self.nets = {
            "a": controlnet(unet),
            "b": controlnet(unet, seed=12, controlnet_conditioning_channel_order="bgr"),
            "pooling": controlnet(unet, seed=13, global_pool_conditions=True),
        }
        if kind == "StableDiffusionPipeline":
            adapter = diffusers.T2IAdapter(
                channels=[16, 32], num_res_blocks=1, downscale_factor=2, in_channels=3
            )
            self.nets["t2i"] = randomise(adapter, 14)
        for name, net in self.nets.items():
            net.save_pretrained(folder / name)
        for i, pixels in enumerate(MAPS):
            Image.fromarray(pixels).save(folder / f"{i}.png")
        Image.fromarray(MASK).save(folder / "mask.png")
        opened = open_pipeline(folder / "base")
        self.pipeline, self.params = opened.pipeline, opened.load()

    def spec(self, name, image=0, kind="map", **options):
        given = "".join(f", {key}={value!r}" for key, value in options.items())
        return f"{kind}(net='{self.folder / name}', image='{self.folder / f'{image}.png'}'{given})"

    def made(self, *specs, steps=4, **request):
        """(picture [H, W, 3] in [-1, 1], programs that were compiled)."""
        request = {"guidance": ("cfg(3)",), "negative": NEGATIVE} | request
        generation = Generation(
            self.pipeline, [PROMPT], Request(control=specs, steps=steps, **request)
        )
        compiled.clear()
        ((_, picture),) = generation.pictures(self.params)
        return picture, len(compiled)

    def expected(self, cls, nets, noises=(), steps=4, **given):
        """What a pipeline of diffusers makes of the same prompt and noise."""
        nets = [self.nets[name] for name in nets]
        pipeline = getattr(diffusers, cls)
        accepted = inspect.signature(pipeline.__init__).parameters
        parts = {n: part for n, part in self.theirs.components.items() if n in accepted}
        parts["scheduler"] = type(parts["scheduler"]).from_config(parts["scheduler"].config)
        name = "adapter" if "Adapter" in cls else "controlnet"
        parts |= {"requires_safety_checker": False} if "requires_safety_checker" in accepted else {}
        pipeline = pipeline(**parts, **{name: nets if nets[1:] else nets[0]})
        pipeline.set_progress_bar_config(disable=True)
        given = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "guidance_scale": 3.0} | given
        with torch.no_grad(), tiny.noises(*noises):
            images = pipeline(**given, num_inference_steps=steps, output_type="np").images
        return tiny.numpy_image(images)[0]


compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
)


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return Models(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return Models(tmp_path_factory.mktemp("sdxl"), "StableDiffusionXLPipeline")


def unit(*index):
    """Maps as diffusers takes them, [0, 1]."""
    maps = [torch.from_numpy(MAPS[i] / np.float32(255)).permute(2, 0, 1)[None] for i in index]
    return maps if maps[1:] else maps[0]


def image():
    """The third map as the picture to start from."""
    return tiny.torch_image(MAPS[2:3] / np.float32(127.5) - 1)


def same(ours, theirs):
    assert ours.std() > 0.1 and np.mean(np.abs(ours) < 1) > 0.5, "saturated or flat"
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


LATENTS = {"latents": tiny.torch_image(NOISE), "height": SIZE, "width": SIZE}
PIPELINE = "StableDiffusionControlNetPipeline"
ONE = {
    "whole": ({"scale": 0.8}, {"controlnet_conditioning_scale": 0.8}),
    "early": ({"end": 0.5}, {"control_guidance_end": 0.5}),
    "between": (
        {"start": 0.2, "end": 0.8},
        {"control_guidance_start": 0.2, "control_guidance_end": 0.8},
    ),
    "guess": (
        {"guess": True, "scale": 1.5},
        {"guess_mode": True, "controlnet_conditioning_scale": 1.5},
    ),
}


@pytest.mark.parametrize("case", ONE)
def test_one_net(sd, case):
    ours, theirs = ONE[case]
    expected = sd.expected(PIPELINE, ["a"], image=unit(0), **LATENTS | theirs)
    same(sd.made(sd.spec("a", **ours))[0], expected)


def test_two_nets(sd):
    """Of which one reads blue, green and red."""
    theirs = {
        "controlnet_conditioning_scale": [0.7, 1.2],
        "control_guidance_start": [0.0, 0.25],
        "control_guidance_end": [0.5, 1.0],
    }
    expected = sd.expected(PIPELINE, ["a", "b"], image=unit(0, 1), **LATENTS | theirs)
    first, second = sd.spec("a", scale=0.7, end=0.5), sd.spec("b", 1, scale=1.2, start=0.25)
    same(sd.made(first, second)[0], expected)


def test_a_net_that_pools_guesses(sd):
    expected = sd.expected(PIPELINE, ["pooling"], image=unit(1), **LATENTS)
    same(sd.made(sd.spec("pooling", 1))[0], expected)


def test_image_to_image(sd):
    noises = image_noise(folded(KEYS, POSTERIOR), (8, 8, 4)), NOISE
    expected = sd.expected(
        "StableDiffusionControlNetImg2ImgPipeline", ["a"], noises, 8,
        image=image(), control_image=unit(0), strength=0.5, control_guidance_end=0.5,
        controlnet_conditioning_scale=1.0,
    )  # fmt: skip
    given = {"image": str(sd.folder / "2.png"), "strength": 0.5, "steps": 8}
    same(sd.made(sd.spec("a", end=0.5), **given)[0], expected)


def test_inpainting(sd):
    """The net sees the picture, -1 where it is repainted."""
    mask = torch.from_numpy(MASK / np.float32(255))[None, None]
    seen = torch.where(mask > 0.5, -1.0, unit(2))
    masked = image_noise(folded(folded(KEYS, MASKED), POSTERIOR), (8, 8, 4))
    noises = image_noise(folded(KEYS, POSTERIOR), (8, 8, 4)), NOISE, masked
    expected = sd.expected(
        "StableDiffusionControlNetInpaintPipeline", ["a"], noises, image=image(), mask_image=mask,
        control_image=seen, strength=1.0, controlnet_conditioning_scale=1.0,
        height=SIZE, width=SIZE,
    )  # fmt: skip
    given = {
        name: str(sd.folder / f"{file}.png") for name, file in (("image", 2), ("mask", "mask"))
    }
    net = f"inpaint(net='{sd.folder / 'a'}')"
    same(sd.made(net, **given, strength=1.0, paste=False)[0], expected)
    own = f"inpaint(net='{sd.folder / 'a'}', image='{given['image']}', mask='{given['mask']}')"
    assert_equal(map_of(sd, own, "inpaint"), map_of(sd, net, "inpaint", **given))


def test_sdxl(sdxl):
    expected = sdxl.expected(
        "StableDiffusionXLControlNetPipeline", ["a"], image=unit(0),
        controlnet_conditioning_scale=0.8, control_guidance_end=0.75, **LATENTS,
    )  # fmt: skip
    same(sdxl.made(sdxl.spec("a", scale=0.8, end=0.75))[0], expected)


def test_a_t2i_adapter(sd):
    expected = sd.expected(
        "StableDiffusionAdapterPipeline", ["t2i"], image=unit(0), adapter_conditioning_scale=0.9,
        **LATENTS,
    )  # fmt: skip
    same(sd.made(sd.spec("t2i", scale=0.9))[0], expected)


def test_scale_zero_changes_nothing_and_numbers_never_compile_again(sd):
    base, _ = sd.made()
    picture, _ = sd.made(sd.spec("a"))
    assert np.abs(picture - base).max() > 0.02
    assert_equal(sd.made(sd.spec("a", scale=0.0))[0], base)
    others = [{"scale": 0.3}, {"scale": (*5 * (0.5,),)}, {"start": 0.5}, {"end": 0.25}]
    others += [{"guess": True}, {"image": 1}, {"kind": "canny"}, {"bgr": True}]
    for changes in others:
        other, programs = sd.made(sd.spec("a", **changes))
        assert not programs, f"{changes} compiles again"
        assert np.abs(other - picture).max() > 1e-4, f"{changes} changes nothing"


def test_perturbed_attention_is_the_controlled_networks_own(sd):
    guidance = ("cfg(3)", "perturbed_attention(2)")
    plain, _ = sd.made(sd.spec("a", scale=0.0))
    perturbed, _ = sd.made(sd.spec("a", scale=0.0), guidance=guidance)
    assert np.abs(perturbed - plain).max() > 1e-3
    np.testing.assert_allclose(perturbed, sd.made(guidance=guidance)[0], atol=1e-4)


def map_of(models, spec, name, **request):
    request = Request(control=(spec,), **request)
    generation = Generation(models.pipeline, [PROMPT], request)
    (extension,) = generation.extensions
    return extension.pictures[name]


def assert_equal(a, b):
    np.testing.assert_array_equal(a, b)


STEPS = 10


@pytest.mark.parametrize(
    "solver", ["ddim", "heun", "dpmpp_2m", "midpoint", "EulerDiscreteScheduler"]
)
@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (0.3, 1.0), (0.0, 0.6), (0.21, 0.79)])
def test_when_a_net_acts(sd, solver, start, end):
    """An evaluation belongs to the step in which its level lies, at a node to the one after it."""
    sampler = samplers.make(sd.pipeline, solver, steps=STEPS)
    steps = [i for i in range(STEPS) if i / STEPS >= start and (i + 1) / STEPS <= end]
    nodes, times = np.asarray(sampler.grid.t), np.asarray(sampler.solver.level.t)
    high, low = nodes[steps[0]], nodes[steps[-1] + 1]
    expected = (times <= high + 1e-9) & (times > low + 1e-9)
    first, last = interval(sampler, start, end)
    seen = np.asarray(sampler.c_noise(sampler.solver.level), np.float32)
    np.testing.assert_array_equal(
        (np.float32(first) <= seen) & (seen <= np.float32(last)), expected
    )
    if len(times) == STEPS:  # as diffusers counts
        np.testing.assert_array_equal(np.flatnonzero(expected), steps)


def test_steps_are_counted_from_where_a_picture_starts(sd):
    sampler = samplers.make(sd.pipeline, steps=8, strength=0.5)
    first, last = interval(sampler, 0.0, 0.5)
    seen = np.asarray(sampler.c_noise(sampler.solver.level))
    np.testing.assert_array_equal((first <= seen) & (seen <= last), [True, True, False, False])
    with pytest.raises(ValueError, match=r"start=0.3 and end=0.4 leave no step of 4.*0.25"):
        interval(sampler, 0.3, 0.4)


def test_guess_mode_acts_less_on_finer_features(sd):
    generation = Generation(
        sd.pipeline, [PROMPT], Request(control=(sd.spec("a", guess=True, scale=2.0),), steps=4)
    )
    (followed,) = generation.extensions[0].followed
    assert followed.net.places == 5  # of two levels: three and one skip connections, and the middle
    np.testing.assert_allclose(followed.scale, 2 * np.logspace(-1, 0, 5), rtol=1e-6)
    assert not followed.null_scale.any()


def test_a_net_that_reads_blue_first_needs_not_be_told(sd):
    """Its config says so, and the map that is shown keeps its colours."""
    plain, told = (sd.spec("b", **options) for options in ({}, {"bgr": True}))
    assert_equal(map_of(sd, plain, "map"), map_of(sd, told, "map"))


def write(path, pixels):
    Image.fromarray(pixels).save(path)
    return str(path)


def test_maps_from_files(sd, tmp_path):
    """Computed of photographs in the picture's size; given ones of more bits, classes and sizes."""
    big = np.zeros((64, 96, 3), np.uint8)
    big[20:, 40:] = 255
    photograph = write(tmp_path / "big.png", big)
    net = f"net='{sd.folder / 'a'}', image"
    canny = map_of(sd, f"canny({net}='{photograph}')", "canny")
    assert canny.shape == (SIZE, SIZE, 3) and set(np.unique(canny)) == {-1, 1}
    blurred = map_of(sd, f"blur({net}='{photograph}', sigma=0)", "blur")
    np.testing.assert_allclose(
        blurred, map_of(sd, f"tile({net}='{photograph}')", "tile"), atol=1e-6
    )
    ramp = np.broadcast_to(np.arange(SIZE, dtype=np.uint16)[:, None] * 100 + 400, (SIZE, SIZE))
    expected = np.broadcast_to(np.linspace(1, -1, SIZE)[:, None], (SIZE, SIZE))
    np.save(tmp_path / "ramp.npy", ramp.astype(np.float32))
    floats = write(tmp_path / "depth.tiff", ramp.astype(np.float32))
    for path in (write(tmp_path / "depth.png", ramp), tmp_path / "ramp.npy", floats):
        depth = map_of(sd, f"depth({net}='{path}', invert=True)", "depth")
        np.testing.assert_allclose(depth[..., 0], expected, atol=1e-5)
    labels = np.zeros((2 * SIZE, 2 * SIZE), np.uint8)
    labels[:, SIZE:] = 2
    painted = Image.fromarray(labels)
    painted.putpalette([9, 9, 9, 8, 8, 8, 200, 100, 0])
    painted.save(tmp_path / "indices.png")
    colours = np.where(labels[..., None] == 0, (120, 120, 120), (6, 230, 230)).astype(np.uint8)
    Image.fromarray(colours).quantize(4).save(tmp_path / "few.png")
    paths = [write(tmp_path / "labels.png", labels), write(tmp_path / "colours.png", colours)]
    np.save(tmp_path / "labels.npy", labels[..., None])
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned to the right when it is shown
    Image.fromarray(np.rot90(labels).copy()).save(tmp_path / "turned.png", exif=turned)
    paths += [tmp_path / "labels.npy", tmp_path / "turned.png"]
    for path in (*paths, tmp_path / "indices.png", tmp_path / "few.png"):
        made = map_of(sd, f"segmentation({net}='{path}')", "segmentation")
        np.testing.assert_allclose(made, colours[::2, ::2] / 127.5 - 1, atol=1e-6)
    twice = Request(control=(f"canny({net}='{photograph}')",) * 2)
    assert set(Generation(sd.pipeline, [PROMPT], twice).extensions[0].pictures) == {
        "canny",
        "canny_2",
    }


MISTAKES = {
    "cany({net}, image='{image}')": "unknown 'cany'.*Did you mean 'canny'",
    "canny({net}, image='{image}', lo=1)": "canny has no option 'lo'",
    "canny(image='{image}')": "canny needs net=",
    "canny(net='nowhere', image='{image}')": "nowhere",
    "canny(net='{folder}/base/vae', image='{image}')": "AutoencoderKL; expected ControlNetModel",
    "canny({net})": 'canny needs image="x.png"',
    "canny({net}, image='none.png')": "image='none.png': no such picture",
    "depth({net})": 'depth needs image="x.png", the map itself',
    "inpaint({net}, image='{image}')": 'inpaint needs mask="x.png"',
    "canny({net}, image='{image}', low=300)": "low=300 must not be above high=200",
    "canny({net}, image='{image}', scale=-1)": "scale must be a finite number >= 0, got -1",
    "canny({net}, image='{image}', scale=(1, 2))": "2 numbers; expected 1, or 5",
    "canny({net}, image='{image}', start=0.6, end=0.5)": "start=0.6 must be below end=0.5",
    "canny({net}, image='{image}', start=0.4, end=0.5)": "leave no step of 4",
    "canny({net}, image='{image}', end=1.5)": r"end must lie in \[0, 1\], got 1.5",
    "canny(net='{folder}/t2i', image='{image}', pool=True)": "T2I-Adapter has no such setting",
    "canny(net='{folder}/wide', image='{image}')": "does not fit a U-Net",
    "segmentation({net}, image='{image}', first=1)": "first=1 has no effect",
    "depth({net}, image='{folder}/row.npy')": r"of shape \(5,\); expected",
    "depth({net}, image='{folder}/text.npy')": "no array that NumPy reads without unpickling",
    "map(net='{folder}/grey', image='{image}', bgr=True)": "bgr=True has no effect",
    "segmentation({net}, image='{folder}/labels.png')": "class 200 is not one of ADE20K's",
}


@pytest.mark.parametrize("spec", MISTAKES)
def test_mistakes_are_named_before_weights_are_read(sd, spec):
    if not (sd.folder / "wide").exists():
        wide = diffusers.T2IAdapter(channels=[32, 32], num_res_blocks=1, downscale_factor=2)
        wide.save_pretrained(sd.folder / "wide")
        channels = {"channels": [16, 32], "in_channels": 1}
        grey = diffusers.T2IAdapter(**channels, num_res_blocks=1, downscale_factor=2)
        grey.save_pretrained(sd.folder / "grey")
        write(sd.folder / "labels.png", np.full((SIZE, SIZE), 200, np.uint8))
        np.save(sd.folder / "row.npy", np.arange(5.0))
        (sd.folder / "text.npy").write_text("1 2 3")
    net = f"net='{sd.folder / 'a'}'"
    given = spec.format(net=net, folder=sd.folder, image=sd.folder / "0.png")
    with pytest.raises((ValueError, FileNotFoundError), match=f"config.control.*{MISTAKES[spec]}"):
        Generation(sd.pipeline, [PROMPT], Request(control=(given,), steps=4))


def test_what_a_net_does_not_take():
    net = Net(T2IAdapter(widths=(8,), halved=(False,), factor=32))
    followed = CHOICES["map"](net="net", image="x.png")
    check_effects(followed, net, (64, 32))
    with pytest.raises(ValueError, match="64 x 48 pixels: the net takes multiples of 32"):
        check_effects(followed, net, (64, 48))
    with pytest.raises(ValueError, match="pool=True has no effect"):
        check_effects(CHOICES["map"](net="run", image="x.png", pool=True), net, (64, 32))


def test_a_net_for_another_model(sd, sdxl):
    with pytest.raises(ValueError, match=r"a ControlNet with .* does not fit a U-Net"):
        request = Request(control=(sdxl.spec("a"),), steps=4)
        Generation(sd.pipeline, [PROMPT], request)
