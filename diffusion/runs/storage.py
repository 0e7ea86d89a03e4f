"""Full disks: how to recognise them, and a file that survives them."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path


def disk_full(error: BaseException) -> bool:
    """Whether an error says that disk or quota are full."""
    codes = errno.ENOSPC, errno.EDQUOT
    return getattr(error, "errno", None) in codes or any(
        os.strerror(c) in str(error) for c in codes
    )


def reason(error: BaseException, folder: Path) -> str:
    """The cause of an error in writing below ``folder``, in a few words."""
    if not disk_full(error):
        text = error.strerror if isinstance(error, OSError) else str(error)
        return (text or type(error).__name__).splitlines()[0]
    free = shutil.disk_usage(folder).free
    return f"the disk is full ({free / 1e6:,.1f} MB free where {folder} is)"


def silence_asyncio() -> None:
    """Silences asyncio, which prints a traceback per array when a save of Orbax fails."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    if not hasattr(sys.unraisablehook, "quiet"):
        before = sys.unraisablehook

        def hook(unraisable):
            if str(unraisable.exc_value) != "Event loop is closed":
                before(unraisable)

        hook.quiet = True
        sys.unraisablehook = hook


class Appender:
    """Appends to a file. Data that a full disk refuses are kept and written with the next ones.

    ``say`` prints a message when the disk is full, and another when it no longer is.
    """

    def __init__(self, path: str | os.PathLike, say: Callable[[str], None]):
        self._path, self._say = Path(path), say
        self._waiting, self._reported = b"", False

    def write(self, data: bytes) -> None:
        """Keeps bytes; ``flush`` writes them."""
        self._waiting += data

    def flush(self) -> None:
        """Writes the kept bytes, all of them or none."""
        if not self._waiting:
            return
        size = 0
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab", buffering=0) as file:
                size = file.tell()
                rest = memoryview(self._waiting)
                while rest:
                    rest = rest[file.write(rest) :]
        except OSError as error:
            if not disk_full(error):
                raise
            if self._path.exists():
                os.truncate(self._path, size)
            if not self._reported:
                self._reported = True
                self._say(
                    f"{self._path} cannot be written: {reason(error, self._path.parent)}; its "
                    "new data are kept and tried again"
                )
            return
        self._waiting = b""
        if self._reported:
            self._reported = False
            self._say(f"{self._path} is complete again")

    def close(self) -> None:
        """Writes the kept bytes, or reports that they are lost."""
        self.flush()
        if self._waiting:
            self._say(f"{self._path} lacks its last {len(self._waiting):,} bytes")
            self._waiting = b""
