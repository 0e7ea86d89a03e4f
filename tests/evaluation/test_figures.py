"""Pictures: every pixel where it belongs, files that open and hold what was drawn."""

import json

import numpy as np
import pytest
from PIL import Image

from diffusion.evaluation import figures

rng = np.random.default_rng(0)


def test_to_uint8_rounds_clips_and_refuses_nan():
    assert figures.to_uint8(np.array([-2, -1, 0, 1, 2])).tolist() == [0, 0, 128, 255, 255]
    for value in (np.nan, np.inf):
        with pytest.raises(FloatingPointError, match="not finite"):
            figures.to_uint8(np.array([0, value]))
    levels = np.arange(256)
    np.testing.assert_array_equal(figures.to_uint8(levels / 127.5 - 1), levels)


def test_upscale_repeats_pixels():
    image = rng.integers(0, 256, (3, 2, 1), dtype=np.uint8)
    large = figures.upscale(image, 4)
    assert large.shape == (12, 8, 1)
    np.testing.assert_array_equal(large[::4, ::4], image)
    np.testing.assert_array_equal(large[3::4, 3::4], image)


def test_grid_places_each_image():
    images = np.linspace(-1, 1, 5).reshape(5, 1, 1, 1) * np.ones((5, 4, 6, 1))
    grid = figures.image_grid(images, 2, scale=3, gap=1)
    assert grid.shape == (1 + 3 * 13, 1 + 2 * 19, 3)
    assert grid.dtype == np.uint8
    levels = figures.to_uint8(images[:, 0, 0, 0])
    for k in range(5):
        top, left = 1 + k // 2 * 13, 1 + k % 2 * 19
        assert np.all(grid[top : top + 12, left : left + 18] == levels[k])
    assert np.all(grid[0] == 255)
    assert np.all(grid[28:, 20:] == 255)  # the sixth place is empty


def test_grid_keeps_colours_and_has_sensible_defaults():
    images = rng.uniform(-1, 1, (10, 8, 8, 3))
    grid = figures.image_grid(images)
    assert grid.shape == (2 + 3 * 50, 2 + 4 * 50, 3)
    np.testing.assert_array_equal(grid[2:50:6, 2:50:6], figures.to_uint8(images[0]))


def test_row_names_are_written_beside_the_grid():
    images = rng.uniform(-1, 1, (6, 32, 32, 1))
    plain = figures.image_grid(images, 3)
    named = figures.image_grid(images, 3, row_names=["cat", "automobile"])
    margin = named.shape[1] - plain.shape[1]
    np.testing.assert_array_equal(named[:, margin:], plain)
    dark = (named[:, :margin] < 128).any(-1)
    middle = len(named) // 2
    assert 0 < dark[:middle].sum() < dark[middle:].sum()  # the longer name is below
    assert not dark[:, :2].any()  # nothing is cut off
    with pytest.raises(ValueError, match="expected 2 row names, got 1"):
        figures.image_grid(images, 3, row_names=["cat"])


def test_grid_refuses_other_shapes():
    for shape in ((8, 8, 1), (2, 8, 8, 2), (0, 8, 8, 1)):
        with pytest.raises(ValueError, match="expected images"):
            figures.image_grid(np.zeros(shape))


@pytest.mark.parametrize("channels", [1, 3])
def test_png_is_lossless_and_carries_metadata(tmp_path, channels):
    image = rng.integers(0, 256, (5, 7, channels), dtype=np.uint8)
    figures.save_png(tmp_path / "a.png", image, {"config": "digits", "note": "σ = 0.5"})
    with Image.open(tmp_path / "a.png") as file:
        np.testing.assert_array_equal(np.asarray(file).reshape(5, 7, channels), image)
        assert file.text == {"config": "digits", "note": "σ = 0.5"}
    with pytest.raises(ValueError, match="float64"):
        figures.save_png(tmp_path / "b.png", np.zeros((5, 7, 3)))


def write_metrics(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_metrics_skip_other_lines_and_keep_the_last_of_a_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 20, "loss": 9}, {"step": 10, "loss": 3}, {"step": 15, "fid": 1}]
    rows += [{"step": 20, "loss": 2}, {"step": 30, "loss": None}]
    write_metrics(path, rows)
    steps, values = figures.read_metrics(path, "loss")
    assert steps.tolist() == [10, 20]
    assert values.tolist() == [3, 2]
    with pytest.raises(ValueError, match="no values of 'kid'"):
        figures.loss_curve(tmp_path / "kid.png", path, key="kid")


def test_smoothing_keeps_constants_and_lowers_noise():
    np.testing.assert_allclose(figures.smooth(np.full(20, 3.0), 4), 3)
    np.testing.assert_allclose(figures.smooth(np.array([2.0]), 4), 2)
    noise = rng.standard_normal(2000)
    # A Gaussian mean of width w has variance 1 / (2 sqrt(pi) w).
    assert figures.smooth(noise, 10).std() == pytest.approx((2 * np.pi**0.5 * 10) ** -0.5, rel=0.2)


def drawn(path):
    """Where a picture is not background."""
    with Image.open(path) as file:
        return np.asarray(file.convert("RGB")).min(-1) < 250


def test_loss_curve_draws_the_data(tmp_path):
    metrics, path = tmp_path / "metrics.jsonl", tmp_path / "loss.png"
    write_metrics(metrics, [{"step": k, "loss": 10 * 0.97**k} for k in range(0, 200)])
    figures.loss_curve(path, metrics, title="a title")
    with Image.open(path) as file:
        assert file.size == (1050, 600)
        pixels = np.asarray(file.convert("RGB")).astype(int)
    blue = np.abs(pixels - [0x25, 0x63, 0xEB]).max(-1) < 12
    blue[:, 975:] = False  # the last value, written beside the end
    blue[:110, 700:] = False  # the legend
    rows, columns = np.nonzero(blue)
    assert np.ptp(columns) > 750
    # A geometric sequence is a straight line on the logarithmic axis.
    inner = (columns > 200) & (columns < 850)
    fit = np.polyfit(columns[inner], rows[inner], 1)
    assert fit[0] > 0.3
    assert np.abs(np.polyval(fit, columns[inner]) - rows[inner]).max() < 8


@pytest.mark.parametrize("losses", [[1.0], [0.5, -0.5, 0.1], [1.0] * 20])
def test_loss_curve_takes_short_negative_and_constant_curves(tmp_path, losses):
    metrics, path = tmp_path / "metrics.jsonl", tmp_path / "loss.png"
    write_metrics(metrics, [{"step": k, "loss": v} for k, v in enumerate(losses)])
    figures.loss_curve(path, metrics)
    assert drawn(path).sum() > 1000


def test_strip_shows_first_and_last_state(tmp_path):
    xs = np.linspace(-1, 1, 21).reshape(21, 1, 1, 1, 1) * np.ones((21, 3, 8, 8, 1))
    figures.trajectory_strip(tmp_path / "s.png", xs, columns=5, scale=1)
    with Image.open(tmp_path / "s.png") as file:
        strip = np.asarray(file)
    assert strip.shape == (2 + 3 * 10, 2 + 5 * 10, 3)
    assert strip[5, 5::10, 0].tolist() == figures.to_uint8(np.linspace(-1, 1, 5)).tolist()
    figures.trajectory_strip(tmp_path / "s.png", xs[:3], columns=10, scale=1)
    assert Image.open(tmp_path / "s.png").size == (2 + 3 * 10, 2 + 3 * 10)


def test_gif_has_a_frame_per_state_and_rests_on_the_last(tmp_path):
    xs = np.clip(0.5 * rng.standard_normal((7, 4, 8, 8, 3)), -1, 1)
    figures.trajectory_gif(tmp_path / "t.gif", xs, columns=4, scale=2, milliseconds=50, hold=900)
    with Image.open(tmp_path / "t.gif") as file:
        assert file.n_frames == 7
        assert file.size == (2 + 4 * 18, 2 + 18)
        assert file.info["loop"] == 0
        durations = []
        for k in range(7):
            file.seek(k)
            durations.append(file.info["duration"])
            expected = figures.image_grid(xs[k], 4, scale=2).astype(int)
            error = np.abs(np.asarray(file.convert("RGB")) - expected)
            assert error.mean() < 12  # 256 colours for all frames
    assert durations == [50] * 6 + [900]


def test_trajectories_of_another_rank_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\[S, N, H, W, C\], got \(3, 8, 8, 1\)"):
        figures.trajectory_gif(tmp_path / "t.gif", np.zeros((3, 8, 8, 1)))
    with pytest.raises(ValueError, match=r"\[S, K, 2\], got \(5, 2\)"):
        figures.path_figure(tmp_path / "p.png", np.zeros((5, 2)))


def test_density_figure_has_a_panel_for_each_set(tmp_path):
    data = rng.uniform(-1, 1, (500, 2))
    figures.density_figure(tmp_path / "one.png", data)
    figures.density_figure(tmp_path / "two.png", data, data)
    one, two = drawn(tmp_path / "one.png"), drawn(tmp_path / "two.png")
    assert (one.shape, two.shape) == ((600, 555), (600, 1110))
    # Same points, same picture: the two density panels hold as much ink.
    left, right = two[:, :555].sum(), two[:, 555:].sum()
    assert left == pytest.approx(right, rel=0.1)
    figures.density_figure(tmp_path / "other.png", data[:5], data)
    other = drawn(tmp_path / "other.png")
    assert other[:, 555:].sum() < 0.5 * other[:, :555].sum()


def test_path_figure_draws_the_first_lines(tmp_path):
    xs = np.linspace(3, 1, 6)[:, None, None] * rng.uniform(-1, 1, (50, 2))
    figures.path_figure(tmp_path / "all.png", xs)
    figures.path_figure(tmp_path / "few.png", xs, lines=3)
    every, few = drawn(tmp_path / "all.png"), drawn(tmp_path / "few.png")
    assert every.shape == (660, 660) and every.sum() > few.sum() + 5000
