"""The manifest of a folder: ``manifest.json``, with the size and CRC-32 of each file.

It is written last. It reveals files that were lost, cut or changed since, and also a damaged
manifest, since it holds a checksum of its own text.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

MANIFEST = "manifest.json"
_PIECE = 1 << 22  # bytes read at once


def write(folder: Path) -> int:
    """Writes the manifest of all files below ``folder``; returns their total bytes."""
    files = {name: list(_measure(path)) for name, path in sorted(_files(folder).items())}
    (folder / MANIFEST).write_text(_sealed(files))
    return sum(size for size, _ in files.values())


def damage(folder: Path, *parts: str) -> list[str]:
    """The differences from the manifest, a line for each file, of all or of these ``parts``."""
    try:
        text = (folder / MANIFEST).read_text()
    except FileNotFoundError:
        return [f"{MANIFEST} is missing"]
    except (OSError, UnicodeDecodeError) as error:
        return [f"{MANIFEST} cannot be read ({error})"]
    try:
        files = json.loads(text)["files"]
        whole = text == _sealed(files)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        return [f"{MANIFEST} was changed or cut"]
    wrong = []
    for name, (size, checksum) in files.items():
        if parts and name.split("/")[0] not in parts:
            continue
        try:
            found = (folder / name).stat().st_size
            if found != size:
                wrong.append(f"{name} has {found} bytes instead of {size}")
            elif _measure(folder / name)[1] != checksum:
                wrong.append(f"{name} was changed: its checksum differs")
        except FileNotFoundError:
            wrong.append(f"{name} is missing")
        except OSError as error:
            wrong.append(f"{name} cannot be read ({error.strerror})")
    return wrong


def size(folder: Path) -> int:
    """Bytes of all files according to the manifest."""
    files = json.loads((folder / MANIFEST).read_text())["files"]
    return sum(size for size, _ in files.values())


def _sealed(files: dict[str, list]) -> str:
    """The manifest's text. CRC-32 finds accidents, at the speed of memory; it is no signature."""
    text = json.dumps(files, indent=1)
    return json.dumps({"seal": f"{zlib.crc32(text.encode()):08x}", "files": files}, indent=1) + "\n"


def _files(folder: Path) -> dict[str, Path]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path for path in paths if path.name != MANIFEST}


def _measure(path: Path) -> tuple[int, str]:
    """(bytes, CRC-32)."""
    size = checksum = 0
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_PIECE):
            size += len(piece)
            checksum = zlib.crc32(piece, checksum)
    return size, f"{checksum:08x}"
