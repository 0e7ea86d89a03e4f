"""TensorBoard's event files: records of protocol buffers, each with checksums.

A record is: the length of the data (uint64, little endian), the masked CRC-32C of these 8 bytes,
the data, and the masked CRC-32C of the data. The data are one ``Event`` message (TensorFlow's
event.proto and summary.proto), of which only the fields that we write are known here.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from diffusion.runs.storage import Appender

LANES = 4096  # parts of long data that are processed side by side

TABLE = np.arange(256, dtype=np.uint32)  # the CRC-32C (Castagnoli) of each byte
for _ in range(8):
    TABLE = (TABLE >> 1) ^ np.where(TABLE & 1, np.uint32(0x82F63B78), np.uint32(0))
LIST = TABLE.tolist()  # faster for single bytes


def crc32c(data: bytes) -> int:
    """The CRC-32C of ``data`` (RFC 3720, appendix B.4)."""
    if len(data) > 16 * LANES:
        return _crc32c_by_lanes(data)
    crc = 0xFFFFFFFF
    for byte in data:
        crc = LIST[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def _crc32c_by_lanes(data: bytes) -> int:
    """The same in NumPy. A CRC is linear: that of A B is that of A, moved past B, xor that of B."""
    width = -(-len(data) // LANES)
    padded = np.zeros(LANES * width, np.uint8)  # zeros in front change nothing
    own = padded[len(padded) - len(data) :]
    own[:] = np.frombuffer(data, np.uint8)
    own[:4] ^= 0xFF  # stands for the initial value, all ones
    crc, moved = np.zeros(LANES, np.uint32), np.uint32(1) << np.arange(32, dtype=np.uint32)
    for column in padded.reshape(LANES, width).T:
        crc = TABLE[(crc ^ column) & 0xFF] ^ (crc >> 8)
        moved = TABLE[moved & 0xFF] ^ (moved >> 8)  # of each bit, past as many zero bytes
    while len(crc) > 1:
        crc = _moved(moved, crc[::2]) ^ crc[1::2]
        moved = _moved(moved, moved)
    return int(crc[0]) ^ 0xFFFFFFFF


def _moved(bits: np.ndarray, crc: np.ndarray) -> np.ndarray:
    """A linear map of CRCs [N], given by its values at the 32 bits."""
    is_set = crc[:, None] >> np.arange(32, dtype=np.uint32) & 1
    return np.bitwise_xor.reduce(np.where(is_set, bits, np.uint32(0)), axis=1)


def record(data: bytes) -> bytes:
    """``data`` in the frame of a record."""
    length = struct.pack("<Q", len(data))
    return length + _checksum(length) + data + _checksum(data)


def _checksum(data: bytes) -> bytes:
    """TFRecord's masked checksum: rotated by 15 bits, plus a constant."""
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _integer(value: int) -> bytes:
    """A varint: seven bits per byte, lowest first; the top bit marks that more follow."""
    groups = []
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])


def _field(number: int, value: int | np.floating | bytes) -> bytes:
    """One field of a message: a varint, a float of 32 or 64 bits, or bytes after their length."""
    if isinstance(value, bytes):
        return _integer(number << 3 | 2) + _integer(len(value)) + value
    if isinstance(value, np.floating):
        return _integer(number << 3 | {8: 1, 4: 5}[value.itemsize]) + value.tobytes()
    return _integer(number << 3) + _integer(value)


class Events:
    """Writes one event file of TensorBoard. What a full disk refuses waits, as in ``Appender``."""

    def __init__(self, folder: str | os.PathLike, say: Callable[[str], None]):
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"
        self._file = Appender(Path(folder) / name, say)
        self._write(_field(3, b"brain.Event:2"))

    def purge(self, step: int) -> None:
        """Makes TensorBoard drop what earlier files of the folder hold from ``step`` on."""
        self._write(_field(2, step) + _field(7, _field(1, 1)))  # a session log: start

    def scalar(self, name: str, value: float, step: int) -> None:
        """One point of a curve, as float32."""
        self._summary(name, _field(2, np.float32(value)), step)

    def image(self, name: str, image: np.ndarray, step: int) -> None:
        """A picture [H, W, 1 or 3], uint8 or float in [0, 1]."""
        if image.dtype != np.uint8:
            image = np.clip(255 * image, 0, 255).astype(np.uint8)
        height, width, channels = image.shape
        buffer = BytesIO()
        Image.fromarray(image[..., 0] if channels == 1 else image).save(buffer, "PNG")
        fields = [height, width, channels, buffer.getvalue()]
        value = b"".join(_field(number, part) for number, part in enumerate(fields, 1))
        self._summary(name, _field(4, value), step)

    def close(self) -> None:
        """Writes what waits; the file can still be appended to."""
        self._file.close()

    def _summary(self, name: str, value: bytes, step: int) -> None:
        self._write(_field(2, step) + _field(5, _field(1, _field(1, name.encode()) + value)))

    def _write(self, fields: bytes) -> None:
        self._file.write(record(_field(1, np.float64(time.time())) + fields))
        self._file.flush()
