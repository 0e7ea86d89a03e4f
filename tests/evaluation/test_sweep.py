"""Budgets become the most steps they allow; results are kept, and nothing is drawn twice."""

import json
from functools import partial

import jax
import numpy as np
import pytest
from PIL import Image

from diffusion import schedules
from diffusion.evaluation import convergence, merits
from diffusion.sampling import grids, solvers
from diffusion.sampling.mixture import gaussian_mixture
from diffusion.sampling.sample import image_keys, sample

SCHEDULE = schedules.RectifiedFlow()
MIXTURE = gaussian_mixture([[-0.6], [0.7]], [0.3, 0.2])
SOLVERS = {
    "ddim": solvers.ddim,
    "ddpm": solvers.ddpm,
    "heun": solvers.flow_heun,
    "midpoint": partial(solvers.midpoint, schedule=SCHEDULE),
}


def make(name, steps):
    if name not in SOLVERS:
        raise ValueError(f"unknown {name!r}")
    if steps > 100:
        raise ValueError("too many steps")
    return SOLVERS[name](grids.uniform(SCHEDULE, steps))


@jax.jit
def draw(table, seed=0):
    return sample(MIXTURE, table, image_keys(seed, np.arange(64)), (1,))


def test_the_most_steps_of_a_budget():
    """ddim N evaluations, heun 2N - 1, midpoint 2N."""
    for budget in (1, 2, 5, 20, 31):
        assert convergence.most_steps(make, "ddim", budget)[0] == budget
        assert convergence.most_steps(make, "heun", budget)[0] == (budget + 1) // 2
    assert convergence.most_steps(make, "midpoint", 31)[0] == 15
    with pytest.raises(ValueError, match="one step takes 2"):
        convergence.most_steps(make, "midpoint", 1)


def test_a_plan_has_no_point_twice_and_says_what_it_lacks():
    entries, notes = convergence.plan(make, ["ddim", "midpoint", "ddim"], [3, 1, 2])
    points = [(e.solver, e.steps, e.budget, e.table.evaluations) for e in entries]
    assert points == [
        *(("ddim", 1, 1, 1), ("ddim", 2, 2, 2), ("ddim", 3, 3, 3)),
        ("midpoint", 1, 2, 2),
    ]
    assert notes == ["midpoint is left out at 1 evaluations: one step takes 2"]
    with pytest.raises(ValueError, match="unknown 'dim'"):
        convergence.plan(make, ["ddim", "dim"], [4])
    with pytest.raises(ValueError, match=r"(?s)no solver is possible.*midpoint is left out"):
        convergence.plan(make, ["midpoint"], [1])


@pytest.mark.parametrize("name", ["ddpm", "heun"])
def test_filled_tables_draw_the_same(name):
    table = make(name, 4)
    filled = convergence.fill(table, 9)
    assert filled.evaluations == 9
    np.testing.assert_allclose(draw(filled), draw(table), atol=1e-6)
    with pytest.raises(ValueError, match="more than 2"):
        convergence.fill(table, 2)


def test_stochastic_solvers_are_told_apart():
    found = {name: convergence.deterministic(make(name, 4)) for name in SOLVERS}
    assert found == {"ddim": True, "ddpm": False, "heun": True, "midpoint": True}


def test_results_are_kept_and_written(tmp_path):
    drawn = []

    def counted(entry, table, seed):
        drawn.append((table, seed))
        return np.asarray(draw(table, seed))

    def judge(x):
        return {"sliced_wasserstein": float(abs(x.mean())), "sliced_wasserstein_real": 0.01}

    def reference(seed):
        return np.asarray(draw(convergence.fill(make("heun", 60), 120), seed))[:32], 1e-3

    path = tmp_path / "sweep.json"
    measure = partial(
        convergence.run, path, seeds=[0], draw=counted, judge=judge, reference=reference
    )
    few, _ = convergence.plan(make, ["ddim", "ddpm"], [4, 8])
    result = measure({"seed": 0}, few, report=lambda line: None)
    assert [(r["solver"], r["evaluations"]) for r in result["rows"]] == [
        *(("ddim", 4), ("ddim", 8), ("ddpm", 4), ("ddpm", 8)),
    ]
    errors = [r["rmse"] for r in result["rows"]]
    assert 0 < errors[1] < 0.7 * errors[0], "of order 1"
    assert errors[2:] == [None, None], "stochastic solvers follow no flow"

    lines = []
    more, _ = convergence.plan(make, ["ddim", "heun"], [4, 8])
    result = measure({"seed": 0}, more, report=lines.append)
    again, _ = convergence.plan(make, ["heun"], [3, 7])
    budgets = [
        row["budget"] for row in measure({"seed": 0}, again, report=lambda line: None)["rows"]
    ]
    assert budgets == [3, 7], "the same tables, asked for with other budgets"
    assert len(drawn) == 6, "ddim was there already"
    assert lines[0].startswith("ddim: 4 evaluations (4 steps), seed 0: sliced_wasserstein")
    assert result["rows"][3]["rmse"] < result["rows"][1]["rmse"], "heun is better than ddim"
    assert len(json.loads(path.read_text())["rows"]) == 6
    measure({"seed": 1}, few, report=lines.append)
    assert len(drawn) == 10, "other settings: everything anew"

    text = convergence.markdown(result, "points: quality", ["a note"])
    assert "- a note" in text and "| evaluations ≤ | 4 | 8 |" in text
    assert "| heun | 2 (3) | 4 (7) |" in text
    convergence.figure(tmp_path / "sweep.png", result, "points")
    picture = np.asarray(Image.open(tmp_path / "sweep.png").convert("RGB")).reshape(-1, 3)
    for color in convergence.COLORS[:2]:
        rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
        assert (np.abs(picture.astype(int) - rgb).max(-1) < 30).any()


def test_samples_that_are_not_finite_are_said_to_be(tmp_path):
    entries, _ = convergence.plan(make, ["ddim"], [4])
    result = convergence.run(
        tmp_path / "sweep.json",
        {},
        entries,
        [0],
        draw=lambda entry, table, seed: np.full((4, 1), np.nan),
        judge=lambda x: pytest.fail("nothing to judge"),
        reference=lambda seed: (np.zeros((2, 1)), 0.0),
        report=lambda line: None,
    )
    assert not result["rows"][0]["finite"] and result["rows"][0]["rmse"] is None


def test_each_point_is_measured_by_each_seed_once(tmp_path):
    drawn = []

    def counted(entry, table, seed):
        drawn.append((table.evaluations, seed))
        return np.asarray(draw(table, seed))

    def reference(seed):
        return np.asarray(draw(make("heun", 60), seed))[:32], 1e-3 * (1 + seed)

    def judge(x):
        own = {f"other_{i}": float(i) for i in range(9)}
        return {"fid_x": float(abs(x.mean())), "fid_x_real": 0.01, "fid_x_ci": 0.1, **own}

    entries, _ = convergence.plan(make, ["ddim"], [4, 8])
    measure = partial(convergence.run, tmp_path / "sweep.json", {}, entries)
    options = {"draw": counted, "judge": judge, "reference": reference}
    one = measure([0], report=lambda line: None, **options)
    result = measure([0, 1, 2], report=lambda line: None, **options)
    assert drawn == [(4, 0), (8, 0), (4, 1), (8, 1), (4, 2), (8, 2)]
    assert [row["seed"] for row in result["rows"]] == [0, 0, 1, 1, 2, 2]
    assert result["rows"][:2] == one["rows"]
    assert result["reference_errors"] == {"0": 1e-3, "1": 2e-3, "2": 3e-3}
    # A seed is followed from its own noise: the errors are those of the solver, not of the noise.
    rmse = [row["rmse"] for row in result["rows"]]
    assert max(rmse) < 0.5
    values = [row["fid_x"] for row in result["rows"] if row["budget"] == 4]
    expected = merits.shown("fid_x", np.mean(values), np.std(values, ddof=1))
    text = convergence.markdown(result, "points")
    assert "## FID (x) (real data: 0.01)" in text and f"| ddim | {expected} |" in text
    assert "fid_x_ci" not in text and "seconds" not in text and "## other_8" in text
    shown = [measure.key for measure in convergence.measures(result)]
    assert shown == ["fid_x", "rmse", *(f"other_{i}" for i in range(9))]
    convergence.figure(tmp_path / "sweep.png", result, "points")
    width, height = Image.open(tmp_path / "sweep.png").size
    assert 1.2 * height < width < 2 * height, "six panels in two lines"
