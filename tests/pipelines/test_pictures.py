"""Pictures in and out: one reader, proportions, pasted masks, and values that are not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_pipelines as tiny
from PIL import Image

from diffusion.evaluation.figures import to_uint8
from diffusion.pipelines import generate, load, open_any, tiles
from diffusion.pipelines.codec import KL
from diffusion.pipelines.picture_files import read_image, read_mask


def saved(tmp_path, image, name="x.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def test_bits_modes_and_orientation(tmp_path):
    grey = np.array([[0, 16384, 32768, 49152, 65535]], np.uint16)
    read = read_image(saved(tmp_path, Image.fromarray(grey)), channels=1)
    np.testing.assert_allclose(read[0, :, 0], [-1, -0.5, 0, 0.5, 1], atol=0.005)
    np.testing.assert_allclose(read_image(Image.fromarray(grey))[0, :, 2], read[0, :, 0])
    cmyk = saved(tmp_path, Image.new("CMYK", (2, 2), (0, 255, 255, 0)), "x.jpg", quality=100)
    assert read_image(cmyk)[0, 0, 0] > 0.9 and read_image(cmyk)[0, 0, 1] < -0.9
    clear = saved(tmp_path, Image.new("RGBA", (2, 2), (0, 0, 0, 0)))
    assert np.all(read_image(clear) == 1), "transparent parts lie on white"
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = saved(tmp_path, Image.new("RGB", (4, 2)), "turned.png", exif=exif)
    assert read_image(turned).shape == (4, 2, 3)
    floats = saved(tmp_path, Image.fromarray(np.zeros((2, 2), np.float32)), "x.tiff")
    with pytest.raises(ValueError, match=r"x\.tiff cannot be read: its values are floats"):
        read_image(floats)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"text\.png cannot be read: it is not a picture"):
        read_mask(tmp_path / "text.png", (2, 2))


def test_proportions_are_kept(tmp_path):
    """A circle stays one, cropped or with a border."""
    y, x = np.mgrid[:40, :80]
    disc = (np.hypot(y - 19.5, x - 39.5) < 15).astype(np.uint8) * 255
    path = saved(tmp_path, Image.fromarray(disc))
    for fit, height in (("crop", 15), ("pad", 7.5)):
        read = read_mask(path, (20, 20), fit)[..., 0]
        rows, columns = read.any(1).sum(), read.any(0).sum()
        assert abs(rows - columns) <= 1 and abs(rows - height) <= 1, fit
    border = read_image(path, (20, 20), fit="pad")
    assert np.all(border[:5] == 1) and np.all(border[15:] == 1) and border[7, 0, 0] == -1
    with pytest.raises(ValueError, match=r"fit='squeeze': expected one of \('crop', 'pad'\)"):
        read_image(path, (20, 20), fit="squeeze")


def test_alpha_of_a_mask_counts(tmp_path):
    mask = Image.new("LA", (4, 1), (255, 255))
    mask.putpixel((0, 0), (255, 0))
    np.testing.assert_array_equal(read_mask(saved(tmp_path, mask), (1, 4))[0, :, 0], [0, 1, 1, 1])
    with pytest.raises(ValueError, match="nothing in this mask is white"):
        read_mask(Image.new("RGBA", (4, 4), (0, 0, 0, 128)), (4, 4))


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    tiny.whole(folder=folder)
    return folder, *load(folder)


def test_what_a_mask_leaves_black_is_the_pictures_own(stable_diffusion, tmp_path):
    _, pipeline, params = stable_diffusion
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))
    mask = np.zeros((16, 16), np.uint8)
    mask[4:12, 4:12] = 255
    given = dict(image=image, mask=Image.fromarray(mask), strength=1.0, steps=4)
    out = {
        paste: np.asarray(generate(pipeline, params, "a cat", **given, paste=paste)[0], np.int32)
        for paste in (True, False)
    }
    known, original = mask == 0, np.asarray(image, np.int32)
    np.testing.assert_array_equal(out[True][known], original[known])
    assert np.abs(out[False] - original)[known].mean() > 1
    np.testing.assert_array_equal(out[True][4:12, 4:12], out[False][4:12, 4:12])
    dot = np.zeros((16, 16), np.uint8)
    dot[4:6, 4:6] = 255  # one latent
    small = given | {"mask": Image.fromarray(dot)}
    painted = np.asarray(generate(pipeline, params, "a cat", **small)[0], np.int32)
    assert np.abs(painted - original)[4:6, 4:6].max() > 1
    with pytest.raises(ValueError, match="misses every latent"):
        dot[:] = 0
        dot[5, 5] = 255
        generate(pipeline, params, "a cat", **given | {"mask": Image.fromarray(dot)})
    with pytest.raises(ValueError, match="other proportions"):
        generate(pipeline, params, "a cat", **given | {"mask": Image.fromarray(mask[:8])})
    with pytest.raises(ValueError, match="paste=False is for a mask"):
        generate(pipeline, params, "a cat", paste=False)
    with pytest.raises(ValueError, match="fit='pad' is for a picture"):
        generate(pipeline, params, "a cat", fit="pad")


def test_sides_that_the_levels_do_not_divide(stable_diffusion):
    _, pipeline, params = stable_diffusion
    assert pipeline.unit == 2  # pixels per latent; the network has two levels
    assert generate(pipeline, params, "a cat", size=(14, 18), steps=4)[0].size == (18, 14)


def test_half_precision_is_decoded_again(stable_diffusion, monkeypatch):
    """Where it overflows; float32 does not."""
    _, pipeline, params = stable_diffusion
    codec, z = pipeline.codec, jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
    expected, decode = codec.decode(params, z), tiles.decode

    def overflowing(net, weights, z, tiling):
        half = jnp.dtype(net.computation) != jnp.float32
        return decode(net, weights, z, tiling) * (np.inf if half else 1)

    monkeypatch.setattr(tiles, "decode", overflowing)
    half = KL(codec.network.clone(dtype=jnp.bfloat16))
    with pytest.warns(UserWarning, match="overflowed in bfloat16.*decoded again in float32"):
        np.testing.assert_allclose(half.decode(params, z), expected, atol=1e-6)
    with pytest.raises(FloatingPointError, match=r"1 of 2, numbers 1\. Damaged"):
        codec.decode(params, z.at[1].set(jnp.nan))


def test_what_is_not_finite_is_never_a_picture(stable_diffusion, tmp_path):
    folder, pipeline, params = stable_diffusion
    broken = params | {"network": jax.tree.map(lambda a: a * jnp.nan, params["network"])}
    with pytest.raises(FloatingPointError, match=r"seed 3 gave values.*1 of 1, numbers 0\."):
        generate(pipeline, broken, "a cat", steps=4, seed=3)
    with pytest.raises(FloatingPointError, match="none is written"):
        to_uint8(np.full((2, 2, 3), np.nan))
    with pytest.raises(ValueError, match="dtype=float16 needs a GPU or TPU"):
        open_any(folder, dtype=jnp.float16)
