import io
import json

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog

from diffusion.runs import events
from diffusion.runs.logging import Logger


def read(folder):
    """All messages in the event files of a folder, oldest file first; checksums are verified."""
    messages = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            frame, data = data[: 16 + size], data[16 + size :]
            assert frame == events.record(frame[12:-4])
            messages.append(Event.FromString(frame[12:-4]))
    return messages


def test_checksum():
    """RFC 3720, appendix B.4, and the check value of CRC-32C."""
    assert events.crc32c(b"123456789") == 0xE3069283
    assert events.crc32c(bytes(32)) == 0x8A9136AA


def test_checksum_of_long_data(monkeypatch):
    data = np.random.default_rng(0).bytes(70_001)
    long = events.crc32c(data)
    monkeypatch.setattr(events, "LANES", len(data))
    assert events.crc32c(data) == long


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


def test_tensorboard_reads_what_is_written(tmp_path):
    logger = Logger(tmp_path)
    picture = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    logger.scalars(300, {"loss/t=0.1": 1e-3, "norm": float("inf")})
    logger.image("samples", picture, 301)
    logger.image("map", np.linspace(0, 1, 4).reshape(2, 2, 1), 2**40)
    logger.rewind(200)
    logger.close()
    first, loss, norm, samples, grey, *_, purge = read(tmp_path / "tensorboard")
    assert first.file_version == "brain.Event:2" and first.wall_time > 1e9
    assert [m.step for m in (loss, norm, samples, grey, purge)] == [300, 300, 301, 2**40, 201]
    (loss,), (norm,) = loss.summary.value, norm.summary.value
    assert loss.tag == "loss/t=0.1" and loss.simple_value == np.float32(1e-3)
    assert norm.simple_value == np.inf
    image = samples.summary.value[0].image
    assert (image.height, image.width, image.colorspace) == (2, 4, 3)
    shown = Image.open(io.BytesIO(image.encoded_image_string))
    np.testing.assert_array_equal(shown, picture)
    shown = Image.open(io.BytesIO(grey.summary.value[0].image.encoded_image_string))
    np.testing.assert_array_equal(shown, [[0, 85], [170, 255]])
    assert purge.session_log.status == SessionLog.START
