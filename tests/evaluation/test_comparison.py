"""Runs in one table: what may be compared, which is best, and that chance is not called a gain."""

import json
import math

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from diffusion.evaluation import comparison, comparison_report, merits, provenance, significance
from diffusion.evaluation.comparison import Cell

ABOUT = {
    "network": "pixels",
    "weights": "",
    "preparation": "",
    "quantised": False,
    "count": 1000,
    "resolution": [8, 8, 1],
    "reference": {"name": "digits test", "checksum": "abc", "count": 500},
}


def results(values, name="fd_pixels", about=ABOUT, spec="frechet(pixels)", settings=None, **more):
    """One result per value, of seeds 0, 1, ..."""
    found = []
    for seed, value in enumerate(values):
        config = {"seed": seed, "optimizer": settings or {}, "model": {}}
        figures = {name: value, "settings": {"step": 20, "sampler": {"seed": 0}}} | more
        if about is not None:
            figures["provenance"] = {spec: about | {"figures": [name]}}
        found.append(comparison.result(f"run{seed}", config, figures))
    return found


def compared(*groups, **options):
    rows = [r for i, group in enumerate(groups) for r in _moved(group, i)]
    return comparison.compare(rows, **options)


def _moved(group, i):
    return [r._replace(settings=r.settings | {"optimizer.learning_rate": float(i)}) for r in group]


def cells(found, name="fd_pixels"):
    return [row["figures"][name] for row in found["rows"]]


def test_welch_in_closed_form():
    """Of two pairs of equal variances t has 2 degrees of freedom, and F(t) is elementary."""
    t = 1 / math.sqrt(0.5**2 + 0.5**2) * 1.0  # means 1 apart, each pair half a unit from its mean
    expected = 1 - t / math.sqrt(2 + t**2)
    assert significance.welch([-0.5, 0.5], [0.5, 1.5]) == pytest.approx(expected, rel=1e-12)
    a, b = np.random.default_rng(0).normal(size=(2, 7))
    expected = stats.ttest_ind(a[:4], 3 * b, equal_var=False).pvalue
    assert significance.welch(a[:4], 3 * b) == pytest.approx(expected, rel=1e-10)
    assert significance.welch([1.0, 1.0], [1.0, 1.0]) == 1
    assert significance.welch([1.0, 1.0], [2.0, 2.0]) == 0
    with pytest.raises(ValueError, match="two values of each, got 1 and 2"):
        significance.welch([1.0], [1.0, 2.0])


def test_intervals_that_touch():
    """Equal intervals that just touch are 2 sqrt(2) half widths' z-values apart."""
    z = 2 * 1.959964 / math.sqrt(2)
    assert significance.by_intervals(0, 2, 1, 1) == pytest.approx(math.erfc(z / math.sqrt(2)))
    # One value without error: at the end of the interval p is 5 %.
    assert significance.by_intervals(3.0, 5.0, 2.0, 0.0) == pytest.approx(0.05, abs=1e-6)
    assert significance.by_intervals(1, 1, 0, 0) == 1 and significance.by_intervals(1, 2, 0, 0) == 0


def test_holm_by_hand():
    assert significance.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert significance.holm([0.5, 0.9]) == [1, 1] and significance.holm([]) == []


def test_chance_is_called_a_difference_in_five_of_a_hundred_tables():
    rng = np.random.default_rng(0)
    tables = 3000

    def share(rows):
        found = 0
        for _ in range(tables):
            drawn = rng.normal(size=(rows, 6))
            own = comparison._tested("lower", {i: _cell(x) for i, x in enumerate(drawn)})
            found += own[0]["like_best"] is False  # a row that is as good as all others
        return found / tables

    assert 2 * share(2) == pytest.approx(0.05, abs=0.013), "of either row, in which the other wins"
    assert share(5) < 0.05 + 0.012


def _cell(values, half=None):
    return Cell(tuple(map(float, values)), half, ABOUT, (), None)


def test_seeds_are_one_row_with_mean_and_deviation():
    found = compared(results([1.0, 2.0, 3.0]), results([4.0, 4.2, 4.4]))
    first, second = cells(found)
    assert (first["mean"], first["spread"], first["values"]) == (2, 1, [1, 2, 3])
    assert first["best"] and not second["best"]
    assert second["p"] == pytest.approx(significance.welch([1, 2, 3], [4, 4.2, 4.4]))
    assert [row["seeds"] for row in found["rows"]] == [3, 3]
    assert found["fields"] == ["optimizer.learning_rate"]
    text = comparison_report.markdown(found)
    assert "| 0.0 | 3 | **2.0 ± 1.0** |" in text and "| 1.0 | 3 | 4.20 ± 0.20 ≈ |" in text
    assert "Welch's t-test over seeds (3 seeds a row)" in text


def test_higher_is_better_of_some_and_neither_of_others():
    groups = [results([0.8, 0.81], "recognised"), results([0.9, 0.91], "recognised")]
    first, second = cells(compared(*groups), "recognised")
    assert second["best"] and first["like_best"] is False
    text = comparison_report.markdown(compared(*groups))
    assert "recognised [%] ↑" in text and "**90.5 ± 0.7**" in text
    groups = [
        results([1.0, 1.1], "nearest_ratio_pixels"),
        results([2.0, 2.1], "nearest_ratio_pixels"),
    ]
    assert not any(c["best"] or c["test"] for c in cells(compared(*groups), "nearest_ratio_pixels"))


def test_one_seed_each_is_compared_by_intervals_or_not_at_all():
    pairs = [results([v], fd_pixels_ci=0.1, fd_pixels_real=0.5) for v in (1.0, 1.1, 2.0)]
    found = compared(*pairs)
    assert [c["like_best"] for c in cells(found)] == [None, True, False]
    assert cells(found)[2]["test"] == comparison.BY_INTERVALS
    text = comparison_report.markdown(found)
    assert "**1.00 ± 0.10**" in text and "half the width" in text
    assert "| real data |  | 0.5 |" in text
    found = compared(results([1.0]), results([2.0]))
    assert [c["best"] for c in cells(found)] == [True, False]
    assert cells(found)[1]["test"] is None and cells(found)[1]["like_best"] is None
    text = comparison_report.markdown(found)
    assert "1 of 2 rows could not be tested" in text and "≈" not in text


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"count": 500}, "500 samples instead of 1,000"),
        ({"network": "lenet5"}, "network lenet5 instead of pixels"),
        ({"weights": "77"}, "weights 77 instead of none"),
        ({"preparation": "PIL"}, "preparation PIL instead of none"),
        ({"quantised": True}, "samples rounded to 8 bits"),
        ({"resolution": [4, 4, 1]}, "resolution 4 × 4 × 1 instead of 8 × 8 × 1"),
        ({"reference": None}, "reference none instead of abc of 500 examples"),
    ],
)
def test_what_depends_on_something_else_stands_apart(changed, said):
    groups = [results([2.0, 2.1]), results([3.0, 3.1]), results([1.0, 1.1], about=ABOUT | changed)]
    found = compared(*groups)
    assert [c["note"] for c in cells(found)] == ["", "", said]
    assert [c["best"] for c in cells(found)] == [True, False, False]
    assert cells(found)[2]["test"] is None
    text = comparison_report.markdown(found)
    assert "1.050 ± 0.071 (a)" in text and f"- a: {said}." in text


def test_options_of_a_metric_matter_and_paths_do_not():
    def specs(a, b):
        return cells(compared(results([1.0, 1.1], spec=a), results([2.0, 2.1], spec=b)))[1]["note"]

    assert specs("frechet(inception('a'), splits=3)", "frechet(inception('b'), splits=3)") == ""
    assert specs("kid(subsets=10)", "kid(subsets=100)") == (
        "options subsets=100 instead of subsets=10"
    )


def test_results_without_provenance_are_compared_with_none():
    groups = [results([2.0, 2.1]), results([1.0, 1.1], about=None)]
    found = compared(*groups)
    assert cells(found)[1]["note"] == provenance.UNKNOWN and not any(
        c["best"] for c in cells(found)
    )
    found = compared(results([2.0, 2.1], about=None), results([1.0, 1.1], about=None))
    assert all(c["note"] == provenance.UNKNOWN for c in cells(found))


def test_a_result_of_other_conditions_is_no_seed():
    few = results([9.0], about=ABOUT | {"count": 500})
    found = compared(results([1.0, 1.2]) + few, results([2.0, 2.1]))
    assert cells(found)[0]["values"] == [1.0, 1.2]
    assert cells(found)[0]["left_out"] == ["500 samples instead of 1,000"]
    assert "left out: 500 samples instead of 1,000" in comparison_report.markdown(found)


def test_an_evaluation_twice_is_one_seed_and_seeds_of_sampling_are_no_runs():
    own = results([1.0, 2.0])
    again = [own[0]._replace(figures={"fd_pixels": 1.0})]
    other = [own[0]._replace(sampler_seed=1, figures={"fd_pixels": 3.0})]
    assert cells(compared(own + again))[0]["values"] == [1, 2]
    assert cells(compared(own + other))[0]["values"] == [2, 2], "the mean of one run, and the other"
    assert cells(compared(own[:1] + other))[0]["values"] == [1, 3], "of one model"


def test_rows_are_told_apart_by_what_all_have_first():
    def result(model, seed, width):
        config = {"seed": seed, "model": {"name": model, model: {f"{model}_width": width}, "x": {}}}
        about = {"frechet(pixels)": ABOUT | {"figures": ["fd_pixels"]}}
        return comparison.result("run", config, {"fd_pixels": 1.0, "provenance": about})

    found = comparison.compare([result("unet", 0, 8), result("unet", 1, 8), result("dit", 0, 4)])
    assert found["fields"] == ["model.name"]
    assert [row["seeds"] for row in found["rows"]] == [1, 2]
    found = comparison.compare([result("unet", 0, 8), result("unet", 1, 16), result("dit", 0, 4)])
    assert found["fields"] == ["model.name", "model.unet.unet_width"]
    assert [row["setting"] for row in found["rows"]] == [
        ["dit", "–"],
        ["unet", "8"],
        ["unet", "16"],
    ]


def test_figures_by_default_are_those_that_all_share_the_main_ones_first():
    extra = {f"other_{i}": 1.0 for i in range(8)} | {"recognised": 0.5, "recognised_ci": 0.1}
    bits = {"bits_held_out": {"bits_per_dim": 2.0, "standard_error": 0.1, "count": 3}}
    both = [results([1.0, 1.1], **extra, **bits), results([2.0, 2.1], **extra, alone=1.0)]
    names = list(compared(*both)["figures"])
    assert names == ["recognised", "fd_pixels", *(f"other_{i}" for i in range(4))]
    found = compared(*both, figures=["bits_held_out.bits_per_dim", "alone"])
    assert cells(found, "bits_held_out.bits_per_dim")[1] is None
    assert found["rows"][0]["figures"]["bits_held_out.bits_per_dim"]["mean"] == 2
    with pytest.raises(ValueError, match=r"figures: unknown 'recognisd'.* mean 'recognised'"):
        compared(*both, figures=["recognisd"])
    with pytest.raises(ValueError, match="no figure is in all results; choose"):
        compared(results([1.0]), results([1.0], "kid_pixels"))


def test_figures_by_class_are_shown_where_they_are_named():
    by_class = {"recognised_per_class": {"3": 0.9}, "recognised_ci_per_class": {"3": 0.2}}
    by_class |= {"recognised_real_per_class": {"3": 0.97}}
    groups = [results([1.0], **by_class), results([2.0], **by_class)]
    assert list(compared(*groups)["figures"]) == ["fd_pixels"]
    found = compared(*groups, figures=["recognised_per_class.3"])
    assert cells(found, "recognised_per_class.3")[0]["half"] == 0.2
    assert cells(found, "recognised_per_class.3")[0]["real"] == 0.97


def test_samples_of_files_are_rows_of_their_own():
    settings = {"samples": {"path": "a.npz", "checksum": "1"}}
    own = comparison.result("x", {"seed": 3, "data": {"name": "digits"}}, {"settings": settings})
    assert own.settings == {"samples.path": "a.npz", "samples.checksum": "1"} and own.seed is None


def test_figures_that_are_not_finite_are_neither_best_nor_tested():
    found = compared(results([math.nan, 1.0]), results([2.0, 2.1]), results([3.0, 3.1]))
    assert [c["best"] for c in cells(found)] == [False, True, False]
    assert "not finite" in comparison_report.markdown(found)


def test_names_and_directions():
    expected = {
        "fid_inception2015": ("FID (inception2015)", "lower"),
        "fd_pixels_half": ("Fréchet distance (pixels half)", "lower"),
        "sfid_inception2015": ("sFID (inception2015)", "lower"),
        "is_inception2015": ("Inception score (inception2015)", "higher"),
        "recall_dinov2": ("recall (dinov2)", "higher"),
        "clip_score_b32": ("CLIP score (b32)", "higher"),
        "retrieval_among_10": ("own caption is among the ten nearest", "higher"),
        "retrieval_first_by_chance": ("retrieval_first_by_chance", ""),
        "isolation": ("isolation", ""),
        "fd_pixels_per_class.3": ("Fréchet distance (pixels per class 3)", "lower"),
        "bits_train.bits_per_dim": ("bits per dimension (bits train)", "lower"),
        "nearest_ratio_pixels": ("nearest / real (pixels)", ""),
    }
    found = {name: (merits.merit(name).label, merits.merit(name).better) for name in expected}
    assert found == expected
    assert merits.shown("kid_x", 0.012345, 0.0012) == "0.0123 ± 0.0012"
    assert merits.shown("recognised", 0.9512) == "95.1"


def test_a_picture_shows_the_best_in_its_colour(tmp_path):
    found = compared(results([1.0, 2.0], fd_pixels_real=0.5), results([4.0, 4.2]))
    json.dumps(found, allow_nan=False)
    comparison_report.picture(tmp_path / "c.png", found)
    pixels = np.asarray(Image.open(tmp_path / "c.png").convert("RGB")).reshape(-1, 3).astype(int)
    for color in (comparison_report.ORANGE, comparison_report.BLUE):
        rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
        assert (np.abs(pixels - rgb).max(-1) < 20).any()


def test_tiny_figures_keep_their_digits():
    assert merits.shown("kid", 1.234e-12, 1.2e-13) == "1.234e-12 ± 1.2e-13"
