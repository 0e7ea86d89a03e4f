import json

import jax
import numpy as np
import pytest
from linear_run import OF_THE_MACHINE

from diffusion.objectives.objective import Weighted
from diffusion.runs.logging import Logger
from diffusion.training.meter import Meter


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def measured(folder, count, interval=None, start=0, **settings):
    """After ``count`` steps, in which example of a quartile come now and then."""
    meter = Meter(Logger(folder), start, 8, 4, 10, interval or {}, **settings)
    with meter:
        if not start:
            meter.add(1, {"loss": 1.0, "q": Weighted(3.0, 0.5), "never": Weighted(0.0, 0.0)})
        meter.compiled(0.1)
        for step in range(max(start, 1) + 1, count + 1):
            meter.waited(1e-7)
            meter.add(step, {"loss": 2.0, "q": Weighted(0.0, 0.0), "never": Weighted(0.0, 0.0)})
    return meter


def test_weighted_means_are_divided_at_last(tmp_path):
    measured(tmp_path, 8)
    first, second = lines(tmp_path)
    assert first["loss"] == pytest.approx(7 / 4)
    assert first["q"] == pytest.approx(6.0)
    assert "never" not in first and "q" not in second


def test_kinds_are_numbered(tmp_path):
    meter = Meter(Logger(tmp_path), 0, 2, 2, 1, {})
    meter.add(1, {"q": Weighted(np.array([1.0, 0.0]), np.array([0.5, 0.0]))})
    meter.add(2, {"q": Weighted(np.array([2.0, 3.0]), np.array([0.5, 0.25]))})
    (row,) = lines(tmp_path)
    assert (row["q1"], row["q2"]) == (3.0, 12.0)


def test_an_interval_goes_on_after_a_restart(tmp_path):
    interval = json.loads(json.dumps(measured(tmp_path / "a", 3).interval()))
    assert not (tmp_path / "a" / "metrics.jsonl").exists()
    measured(tmp_path / "a", 8, interval, start=3)
    measured(tmp_path / "b", 8)
    for a, b in zip(lines(tmp_path / "a"), lines(tmp_path / "b")):
        for row in (a, b):
            for name in OF_THE_MACHINE:
                row.pop(name, None)
        assert a == b


def test_of_the_machine(tmp_path):
    devices = jax.devices()[:2]
    measured(tmp_path, 8, flops=1e6, peak=1e15, devices=devices)
    for row in lines(tmp_path):
        speed = row["images_per_second"]
        assert row["step_seconds"] == pytest.approx(10 / speed)
        assert row["teraflops_per_second"] == pytest.approx(speed * 1e6 / 1e12)
        assert row["share_of_peak"] == pytest.approx(speed * 1e6 / 1e15)
        assert row["waiting_for_data"] * row["step_seconds"] == pytest.approx(1e-7)
        assert 0.01 < row["process_memory_gib"] < 1000  # CPUs have no memory of their own
        assert {*row} - {*OF_THE_MACHINE} <= {"step", "loss", "q"}


class Card:
    def __init__(self, peak):
        self.peak = peak

    def memory_stats(self):
        return {"peak_bytes_in_use": self.peak * 2**30}


def test_memory_of_the_fullest_device(tmp_path):
    measured(tmp_path, 4, devices=[Card(3), Card(5)])
    (row,) = lines(tmp_path)
    assert row["device_memory_gib"] == 5 and "process_memory_gib" not in row
