"""Pictures of every kind come out upright, opaque, in 8 bits, resized and cropped as asked."""

import io

import numpy as np
import pytest
from PIL import Image

from diffusion.data import images

RNG = np.random.default_rng(0)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(
        file, kind, **options
    )
    return file.getvalue()


def decoded(data, **options):
    return np.asarray(images.decode(data, **options))


UPRIGHT = {  # by EXIF's definition: where the stored first row and first column belong
    1: lambda x: x,
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_rotated_images_are_turned_upright(orientation, kind):
    stored = RNG.integers(0, 256, (3, 5, 3), np.uint8)
    exif = Image.Exif()
    exif[images.ORIENTATION] = orientation
    data = encoded(stored, kind, exif=exif)
    expected = UPRIGHT[orientation](stored)
    np.testing.assert_array_equal(decoded(data), expected)
    assert images.size(data) == expected.shape[:2]


def test_rotated_jpegs_are_turned_upright_when_they_are_reduced_too():
    ramp = np.broadcast_to(np.linspace(0, 255, 640)[:, None, None], (640, 320, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[images.ORIENTATION] = 6
    data = encoded(np.rot90(ramp), "JPEG", quality=95, exif=exif)
    assert images.size(data) == (640, 320)
    small = images.decode(data, covering=(64, 32))
    assert small.size == (80, 160)  # read at a quarter: half would be more than GAP asks for
    x = images.fit(small, 64, 32).astype(int)
    assert np.all(np.diff(x[:, 16, 0]) > 0) and np.ptp(x[:, :, 0], axis=1).max() <= 2


def test_transparent_images_lie_on_the_background():
    x = np.zeros((1, 3, 4), np.uint8)
    x[0, :, :3], x[0, :, 3] = (200, 100, 0), (255, 51, 0)
    below = (100, 200, 255)
    expected = [[200, 100, 0], [120, 180, 204], [100, 200, 255]]
    laid = decoded(encoded(x), background=below)
    np.testing.assert_allclose(laid[0], expected, atol=1)
    np.testing.assert_array_equal(decoded(x, background=below), laid)
    grey = np.asarray(Image.fromarray(np.array([expected], np.uint8)).convert("L"))
    np.testing.assert_allclose(decoded(encoded(x), background=below, channels=1), grey, atol=1)
    both = np.array([[[50, 255], [50, 0]]], np.uint8)  # grey with opacity
    np.testing.assert_array_equal(decoded(encoded(both), background=below)[0], [[50] * 3, below])


def test_palettes_and_single_transparent_colours():
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    colours = [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    np.testing.assert_array_equal(decoded(encoded(image))[0], colours)
    below = (9, 9, 9)
    one = decoded(encoded(image, transparency=1), background=below)
    np.testing.assert_array_equal(one[0], [colours[0], below, colours[2]])
    some = decoded(encoded(image, transparency=bytes([255, 0, 255])), background=below)
    np.testing.assert_array_equal(some, one)
    keyed = encoded(Image.fromarray(np.array([colours], np.uint8)), transparency=(0, 0, 255))
    np.testing.assert_array_equal(decoded(keyed, background=below)[0, 2], below)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_become_eight(kind):
    values = np.array([[0, 128, 257 * 3, 257 * 3 + 129, 65_535]], np.uint16)
    data = encoded(Image.fromarray(values), kind)
    np.testing.assert_array_equal(decoded(data, channels=1), [[0, 0, 3, 4, 255]])
    assert decoded(data).shape == (1, 5, 3)


def test_other_modes():
    np.testing.assert_array_equal(
        decoded(encoded(Image.fromarray(np.array([[True, False]])))), [[[255] * 3, [0] * 3]]
    )
    cyan = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    np.testing.assert_allclose(decoded(encoded(cyan, "JPEG"))[4, 4], [0, 255, 255], atol=3)
    grey = RNG.integers(0, 256, (2, 3), np.uint8)
    for array in (grey, grey[..., None], encoded(grey)):
        np.testing.assert_array_equal(decoded(array, channels=1), grey)
        np.testing.assert_array_equal(decoded(array), np.repeat(grey[..., None], 3, -1))
    first = Image.fromarray(np.full((2, 2), 10, np.uint8))
    gif = encoded(first, "GIF", save_all=True, append_images=[Image.new("L", (2, 2), 200)])
    assert np.all(decoded(gif) == 10)
    assert images.mode(gif) == "P animated" or images.mode(gif) == "L animated"


def test_floats_have_no_range():
    data = encoded(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF")
    with pytest.raises(images.UnreadableError, match="floats, of no fixed range"):
        images.decode(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_truncated_images_are_unreadable(kind):
    data = encoded(RNG.integers(0, 256, (64, 64, 3), np.uint8), kind)
    for options in ({}, {"covering": (1, 1)}):
        images.decode(data, **options)
        with pytest.raises(images.UnreadableError):
            images.decode(data[: len(data) // 2], **options)


@pytest.mark.parametrize("data", [b"", b"not an image", b"\x89PNG\r\n\x1a\n", b"GIF89a"])
def test_other_files_are_unreadable(data, tmp_path):
    for picture in (data, tmp_path / "x.png"):
        if not isinstance(picture, bytes):
            picture.write_bytes(data)
        for function in (images.decode, images.size):
            with pytest.raises(images.UnreadableError):
                function(picture)
    with pytest.raises(images.UnreadableError, match="No such file"):
        images.decode(tmp_path / "absent.png")


def test_crops_lie_where_they_are_asked_for():
    x = RNG.integers(0, 256, (4, 10, 3), np.uint8)
    image = Image.fromarray(x)
    for at, left in ((0.0, 0), (0.5, 3), (1.0, 6)):
        np.testing.assert_array_equal(images.fit(image, 4, 4, (0.9, at)), x[:, left : left + 4])
    tall = Image.fromarray(x.swapaxes(0, 1))
    np.testing.assert_array_equal(images.fit(tall, 4, 4, (1.0, 0.2)), x.swapaxes(0, 1)[6:])
    np.testing.assert_array_equal(images.fit(image, 4, 10), x)


def test_resizing_covers_keeps_the_aspect_and_filters():
    # A disc stays a disc: as high as wide, after a crop and a reduction by 2.5.
    y, x = np.mgrid[:150, :250] + 0.5
    disc = (255 * ((x - 125) ** 2 + (y - 75) ** 2 < 50**2)).astype(np.uint8)
    small = images.fit(Image.fromarray(disc), 60, 60)[..., 0] / 255
    assert small.sum(0).max() == pytest.approx(small.sum(1).max(), abs=0.1)
    assert small.sum() == pytest.approx(np.pi * 20**2, rel=2e-3)
    # What is finer than the new pixels becomes its mean instead of a pattern.
    checks = (255 * (np.indices((90, 90)).sum(0) % 2)).astype(np.uint8)
    flat = images.fit(Image.fromarray(checks), 40, 40)
    assert np.abs(flat.astype(int) - 127.5).max() < 3
    # A smooth ramp is itself, also enlarged.
    ramp = Image.fromarray(np.broadcast_to(np.arange(0, 240, 2, np.uint8), (120, 120)))
    large = images.fit(ramp, 240, 240)[120, 20:-20, 0].astype(float)
    np.testing.assert_allclose(large, np.arange(20, 220) - 0.5, atol=1)


def test_reduced_decoding_is_close_to_the_whole():
    y, x = np.mgrid[:256, :384] / 16
    scene = np.stack([np.sin(x + k) * np.cos(y * (k + 1)) for k in range(3)], -1)
    scene += RNG.normal(0, 0.1, scene.shape)
    data = encoded((127 + 60 * scene).clip(0, 255).astype(np.uint8), "JPEG", quality=90)
    small = images.decode(data, covering=(48, 48))
    assert small.size < images.decode(data).size
    a, b = (images.fit(i, 48, 48).astype(float) for i in (small, images.decode(data)))
    assert 10 * np.log10(255**2 / np.mean((a - b) ** 2)) > 38
