import json

import numpy as np
import pytest

from diffusion.runs.logging import Logger


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_rewind_cuts_later_and_broken_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    logger = Logger(tmp_path)
    for step in (1, 2, 3, 4):
        logger.scalars(step, {"loss": 1 / step})
    with path.open("a") as file:
        file.write('{"step": 5, "lo')  # as a killed run leaves it
    logger.rewind(3)
    assert steps(path) == [1, 2, 3]
    logger.scalars(4, {"loss": np.float32(0.5)})
    logger.close()
    assert steps(path) == [1, 2, 3, 4]
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_numbers_that_json_lacks(tmp_path):
    logger = Logger(tmp_path)
    logger.scalars(1, {"loss": float("nan"), "mae": 2})
    logger.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 1,
        "loss": None,
        "mae": 2.0,
    }


def test_images(tmp_path):
    logger = Logger(tmp_path)
    logger.image("samples", np.zeros((4, 6, 3), np.uint8), 1)
    logger.image("samples", np.zeros((4, 6, 1), np.float32), 2)
    with pytest.raises(ValueError, match=r"\(4, 6\)"):
        logger.image("samples", np.zeros((4, 6)), 3)
    logger.close()
