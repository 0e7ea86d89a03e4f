"""Condition maps against closed forms, and Canny's edges against OpenCV's."""

import numpy as np
import pytest
from scipy import special

from diffusion.conditions import colours, edges, given
from diffusion.conditions.ade20k import PALETTE

COMPUTED = (
    *(edges.canny, edges.soft_edges, edges.scribble, edges.lineart),
    *(colours.shuffle, colours.blur, colours.segments, colours.picture),
)


def noise():
    """uint8 [20, 24, 3], means of 3 x 3 random pixels."""
    x = np.random.default_rng(7).integers(0, 256, (20, 24, 3))
    near = [np.roll(x, (i, j), (0, 1)) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    return (sum(near) // 9).astype(np.uint8)


def square(side=48, dark=0, light=255):
    """A light square, rows 12 to 35, columns 16 to 31."""
    x = np.full((side, side, 3), dark, np.uint8)
    x[12:36, 16:32] = light
    return x


# cv2.Canny(noise(), low, high) > 0 of OpenCV 4.14, packed bits.
OPENCV = {
    (100, 200): "fe8c52119c3e20302b1e472406fc7492969290621cf10227b4d25c32065b66b0c2d48530085106eb5a"
    "2a20041b39ca9262226bb3d2059992ec5cb24f",
    (120, 260): "fe8c52119c3e20302b1e472406fc7492969290621cf00227b4125c32065b66b0c2d48530085106eb5a"
    "2a20041b39ca9262226bb3d2059992ec5cb24f",
}
OPENCV_RED = (
    "7e8152019e5e002468e064a4205cbc104690906214f34213448272414e528224938f972848432648622a08a14b1b28"
    "8ad2286c0234a7839ca07cb69e"
)


def unpacked(text):
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8)).reshape(20, 24)


@pytest.mark.parametrize("thresholds", OPENCV)
def test_canny_is_opencv_to_the_pixel(thresholds):
    made = edges.canny(noise(), *thresholds)
    np.testing.assert_array_equal(made[..., 0], unpacked(OPENCV[thresholds]))
    floats = edges.canny(noise() / np.float32(255), *thresholds)
    np.testing.assert_array_equal(made, floats)


def test_canny_of_one_channel():
    made = edges.canny(noise()[..., :1])
    np.testing.assert_array_equal(made[..., 2], unpacked(OPENCV_RED))


def test_canny_keeps_what_is_tied_to_a_strong_edge():
    x = np.zeros((20, 40, 3), np.uint8)
    x[:, 20:] = np.linspace(10, 60, 20).astype(np.uint8)[:, None, None]  # gradients to 250
    alone = edges.canny(x[:8], 100, 200)
    assert not alone.any()
    tied = edges.canny(x, 100, 200)[..., 0]
    assert tied[10:].any(1).all() and tied[7].any() and not tied[:3].any()
    np.testing.assert_array_equal(np.unique(np.nonzero(tied)[1]), [20])


def test_soft_edges_of_a_ramp_and_of_a_step():
    ramp = np.broadcast_to(np.arange(40)[None, :, None] / 400, (30, 40, 1))  # 1/400 per pixel
    made = edges.soft_edges(ramp.astype(np.float64), sigma=2, full=0.01)
    np.testing.assert_allclose(made[:, 12:28], 0.25, atol=1e-6)
    step = edges.soft_edges(square(), sigma=0, full=1.0)[..., 0]
    np.testing.assert_allclose(step[24, 14:18], [0, 0.5, 0.5, 0], atol=1e-6)
    diagonal = np.add.outer(np.arange(20), np.arange(20))[..., None] / 400.0
    made = edges.soft_edges(diagonal, sigma=0, full=1.0)
    np.testing.assert_allclose(made[2:-2, 2:-2], np.sqrt(2) / 400, atol=1e-7)


def test_lineart_of_an_edge_is_a_difference_of_error_functions():
    x = np.zeros((9, 120, 1))
    x[:, 60:] = 1
    made = edges.lineart(x, sigma=3, ratio=2, full=0.5)[4, :, 0]
    at = np.arange(120) - 59.5

    def phi(s):
        return special.ndtr(at / s)

    np.testing.assert_allclose(made, np.clip((phi(6) - phi(3)) / 0.5, 0, 1), atol=4e-3)
    assert made[:60].max() > 0.2 and not made[61:].any()  # the dark side alone


def test_scribbles_are_strokes_of_their_width_around_the_edge():
    made = edges.scribble(square(), sigma=2, threshold=0.05, width=4)[..., 0]
    assert set(np.unique(made)) == {0, 1}
    row = made[24]
    left = np.flatnonzero(row[:24])
    assert 3 <= len(left) <= 5 and abs(left.mean() - 15.5) <= 0.5
    assert not edges.scribble(np.full((16, 16, 3), 90, np.uint8)).any()


def test_shuffle_keeps_colours_and_moves_them():
    x = square(light=200)
    made = colours.shuffle(x, seed=3, cell=16)
    np.testing.assert_array_equal(made, colours.shuffle(x, seed=3, cell=16))
    assert (made != colours.shuffle(x, seed=4, cell=16)).any()
    assert np.abs(made - x / 255).mean() > 0.05
    assert made.min() >= 0 and made.max() <= 200 / 255 + 1e-6 and made.max() > 0.7


def test_blur_of_a_point_is_the_gaussian():
    x = np.zeros((41, 41, 1))
    x[20, 20] = 1
    at = np.arange(41) - 20
    gaussian = np.exp(-(at**2) / 18) / np.exp(-(at**2) / 18).sum()
    np.testing.assert_allclose(
        colours.blur(x, sigma=3)[..., 1], np.outer(gaussian, gaussian), atol=2e-6
    )


def test_segments_are_few_follow_edges_and_keep_means():
    x = square(dark=20, light=220)
    made = colours.segments(x, count=16, compactness=1.0)
    np.testing.assert_allclose(made, x / 255, atol=1e-6)  # two colours, each segment of one
    x = noise()
    made = colours.segments(x, count=12)
    assert 4 <= len(np.unique(made.reshape(-1, 3), axis=0)) <= 16
    np.testing.assert_allclose(made.mean((0, 1)), (x / 255).mean((0, 1)), atol=1e-5)


def test_lab_of_known_colours():
    rgb = np.array([[1.0, 1, 1], [1, 0, 0], [0, 0, 0], [0.5, 0.5, 0.5]])
    expected = [[100, 0, 0], [53.24, 80.09, 67.20], [0, 0, 0], [53.39, 0, 0]]
    np.testing.assert_allclose(colours.lab(rgb), expected, atol=0.02)


@pytest.mark.parametrize("function", COMPUTED, ids=lambda f: f.__name__)
def test_kinds_of_input(function):
    """Bytes and floats, colours and grey; white on black, deterministic."""
    x = noise()
    made = function(x)
    assert made.shape == x.shape and made.dtype == np.float32
    assert made.min() >= 0 and made.max() <= 1
    np.testing.assert_allclose(function(x / 255), made, atol=1e-6)
    grey = function(x[..., :1])
    np.testing.assert_array_equal(grey[..., 0], grey[..., 2])
    for wrong in (x[..., 0], x.astype(np.int32), 1.1 + x / 255, np.full((4, 4, 3), np.nan)):
        with pytest.raises(ValueError, match="a picture has"):
            function(wrong)


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (edges.canny, {"low": -1}, r"low must lie in \[0, 2040\]"),
        (edges.canny, {"high": 3000}, "high must lie"),
        (edges.canny, {"low": 210}, "low=210 must not be above high=200"),
        (edges.soft_edges, {"full": 0}, "full must lie"),
        (edges.soft_edges, {"sigma": float("nan")}, "sigma must lie"),
        (edges.scribble, {"width": 0}, "width must lie"),
        (edges.lineart, {"ratio": 1.0}, "ratio must lie"),
        (colours.shuffle, {"seed": -1}, "seed must lie"),
        (colours.blur, {"sigma": -2}, "sigma must lie"),
        (colours.segments, {"count": 0}, "count must lie"),
        (colours.segments, {"compactness": 0}, "compactness must lie"),
    ],
)
def test_options_out_of_range(function, options, message):
    with pytest.raises(ValueError, match=message):
        function(noise(), **options)


def test_depth_is_normalised_near_white():
    distance = np.array([[1000, 2000], [3000, 5000]], np.uint16)
    expected = np.array([[1, 0.75], [0.5, 0]])
    for x in (distance, distance.astype(np.float32), distance[..., None]):
        np.testing.assert_allclose(given.depth(x, invert=True)[..., 0], expected, atol=1e-6)
    np.testing.assert_allclose(given.depth(distance)[..., 1], 1 - expected, atol=1e-6)
    far = np.array([[1.0, 2.0], [3.0, np.inf]])
    np.testing.assert_allclose(given.depth(far, invert=True)[..., 0], [[1, 0.5], [0, 0]])
    huge = np.array([[-1e308, 0, 1e308]])
    np.testing.assert_allclose(given.depth(huge)[..., 0], [[0, 0.5, 1]], atol=1e-7)
    eight = np.array([[10, 200]], np.uint8)  # as it is
    np.testing.assert_allclose(given.depth(eight)[..., 0], eight / 255, atol=1e-7)
    for wrong in (np.array([[1, np.nan]]), np.array([[np.inf]])):
        with pytest.raises(ValueError, match="finite values and no NaN"):
            given.depth(wrong)


def test_segmentation_colours():
    assert len(np.unique(PALETTE, axis=0)) >= 148
    labels = np.array([[0, 2, 255], [149, 21, 4]], np.uint8)
    made = np.round(255 * given.segmentation(labels)).astype(int)
    expected = [[(120, 120, 120), (6, 230, 230), (0, 0, 0)], [(92, 0, 255), (61, 230, 250), None]]
    for i, j in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1)):
        assert tuple(made[i, j]) == expected[i][j]  # wall, sky, none, flag, water
    shifted = given.segmentation(np.array([[0, 3]]), first=1)
    np.testing.assert_allclose(255 * shifted, [[(0, 0, 0), (6, 230, 230)]], atol=1e-4)
    coloured = given.segmentation(PALETTE[labels.clip(max=149)])
    np.testing.assert_allclose(coloured[0, 1], PALETTE[2] / 255, atol=1e-7)
    for kind in (np.uint8, np.int32):
        one = labels.astype(kind)[..., None]
        np.testing.assert_array_equal(given.segmentation(one), given.segmentation(labels))
    with pytest.raises(ValueError, match="first=1 has no effect"):
        given.segmentation(PALETTE[labels.clip(max=149)], first=1)
    with pytest.raises(ValueError, match="class 150 is not one of ADE20K"):
        given.segmentation(np.array([[150]]))
    with pytest.raises(ValueError, match="whole numbers"):
        given.segmentation(np.array([[0.5]]))


def test_what_is_inpainted_is_minus_one():
    x, mask = noise(), np.zeros((20, 24, 1))
    mask[4:8, 5:9] = 1
    made = given.inpaint(x, mask)
    assert (made[4:8, 5:9] == -1).all() and made.dtype == np.float32
    np.testing.assert_allclose(made[8:], x[8:] / 255, atol=1e-7)
