import json
import sys
from types import ModuleType

import numpy as np
import pytest

from diffusion.runs.logging import Logger, Tracker, wandb_installed


class Stub(ModuleType):
    """As much of wandb as is used."""

    Image = staticmethod(np.shape)

    def __init__(self):
        super().__init__("wandb")
        self.runs, self.logged, self.finished = [], [], 0

    def init(self, **settings):
        self.runs.append(settings)
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    stub = Stub()
    monkeypatch.setitem(sys.modules, "wandb", stub)
    return stub


def test_the_same_run_goes_on_after_a_restart(tmp_path, wandb):
    assert wandb_installed()
    for step in (1, 2):
        tracker = Tracker(tmp_path, "project", {"seed": 1})
        logger = Logger(tmp_path, tracker)
        logger.scalars(step, {"loss": 0.5})
        logger.image("samples", np.zeros((4, 6, 3), np.uint8), step)
        logger.close()
        tracker.close()
    first, second = wandb.runs
    assert first == second
    assert first["project"] == "project" and first["resume"] == "allow" and len(first["id"]) > 8
    assert first["config"] == {"seed": 1}
    assert wandb.logged == [
        (1, {"loss": 0.5}),
        (1, {"samples": (4, 6, 3)}),
        (2, {"loss": 0.5}),
        (2, {"samples": (4, 6, 3)}),
    ]
    assert wandb.finished == 2
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_other_workdirs_are_other_runs(tmp_path, wandb):
    for name in "ab":
        (tmp_path / name).mkdir()
        Tracker(tmp_path / name, "project", {})
    assert wandb.runs[0]["id"] != wandb.runs[1]["id"]


def test_nothing_is_imported_unless_asked_for(tmp_path):
    Logger(tmp_path).scalars(1, {"loss": 0.5})
    assert "wandb" not in sys.modules
