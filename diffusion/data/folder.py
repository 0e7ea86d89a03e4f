"""A folder of images: with class subfolders, with captions, or plain.

    DIR/cat/1.png, DIR/dog/2.jpg              subfolders are classes, in alphabetical order
    DIR/1.png, DIR/metadata.jsonl             {"file_name": "1.png", "text": "a cat"}
    DIR/1.png, DIR/metadata.csv               file_name,text: a header, then a line for each image
    DIR/1.png, DIR/1.txt                      its caption, beside each image (also in subfolders)
    DIR/1.png, DIR/2.png, DIR/metadata.jsonl  {"file_name": "1.png", "edited": "2.png",
                                              "text": "make it red"}, for each edit of an image
    DIR/train/..., DIR/test/...               any of these, in splits; also val or validation

Without splits, a share of the images is held out: those whose path has a small hash. So the same
images are held out on every machine, and also after other images were added.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusion.data import images
from diffusion.data.sources import MOST_CLASSES, Pictures

METADATA = "metadata.jsonl"
TABLE = "metadata.csv"
TEXT = ".txt"
CAPTIONS = ("text", "caption")
EDITED = "edited"
HELD_OUT = ("test", "val", "validation")


@dataclasses.dataclass(frozen=True)
class Listing:
    """The images of one split."""

    root: Path
    files: tuple[str, ...]  # paths below the root, with slashes
    label: np.ndarray | None = None  # [N] int32
    class_names: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()  # one per image, or none at all
    edited: tuple[str, ...] = ()  # the image after an edit, one per image, or none at all

    def __len__(self) -> int:
        return len(self.files)

    def take(self, keep: np.ndarray) -> Listing:
        """The images at the indices ``keep``, or where ``keep`` is True."""
        index = np.arange(len(self))[keep]
        return dataclasses.replace(
            self,
            files=tuple(self.files[i] for i in index),
            label=None if self.label is None else self.label[index],
            captions=tuple(self.captions[i] for i in index) if self.captions else (),
            edited=tuple(self.edited[i] for i in index) if self.edited else (),
        )

    @property
    def pictures(self) -> Pictures:
        """The images, as files."""
        files = _Files(str(self.root), self.files)
        columns = {} if self.label is None else {"label": self.label}
        return Pictures(len(self), files.path, files.name, columns)


@dataclasses.dataclass(frozen=True)
class _Files:
    root: str
    files: tuple[str, ...]

    def path(self, i: int) -> Path:
        return Path(self.root, self.files[i])

    def name(self, i: int) -> str:
        return os.path.join(self.root, self.files[i])


def read(folder: str | Path, split: str, held_out: float = 0.05) -> Listing:
    """The images of a split, ``train`` or ``test``; nothing is opened but captions.

    If the folder has no split subfolders, the share ``held_out`` of the images is ``test``.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    tests = [name for name in HELD_OUT if (folder / name).is_dir()][:1]
    if not (folder / "train").is_dir() and tests and not _metadata(folder):
        raise FileNotFoundError(f"{folder} has {tests[0]} but no train beside it")
    if _metadata(folder) or not (folder / "train").is_dir():
        whole = _read_one(folder)
        parts = {name: _below(whole, name) for name in ("train", *tests)}
        if not len(parts["train"]):
            return _split(whole, split, held_out)
    else:
        _check_beside(folder)
        # A single class is refused in train only: test may lack the others.
        parts = {name: _read_one(folder / name, name == "train") for name in ("train", *tests)}
    if not tests or not len(parts[tests[0]]):
        return _split(parts["train"], split, held_out)
    names = parts["train"].class_names
    return parts["train"] if split == "train" else _with_classes(parts[tests[0]], names)


def pictures(folder: str | Path) -> tuple[Path, ...]:
    """The images in a folder and below, whatever they are called, in order."""
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    return tuple(root / name for name in _images(_files(root)))


def _below(listing: Listing, name: str) -> Listing:
    return listing.take(np.array([file.startswith(f"{name}/") for file in listing.files], bool))


def _check_beside(folder: Path) -> None:
    """Refuses other folders of images beside ``train``, which could then be a class."""
    for entry in sorted(folder.iterdir()):
        known = entry.name in ("train", *HELD_OUT) or entry.name.startswith(".")
        if (
            not known
            and entry.is_dir()
            and any(f.lower().endswith(images.SUFFIXES) for f in _files(entry))
        ):
            raise ValueError(
                f"{folder} has images in train, a split, and in {entry.name}, which is not a "
                f"split; expected only train and {', '.join(HELD_OUT)}"
            )


def _split(listing: Listing, split: str, share: float) -> Listing:
    """The images of ``train`` or ``test``, at least one in each."""
    chosen = held_out_by_hash(listing.files, share, str(listing.root))
    return listing.take(chosen if split == "test" else ~chosen)


def held_out_by_hash(names: Sequence[str], share: float, what: str) -> np.ndarray:
    """[N] bool: True for the names with the smallest hashes, a share of them, at least one."""
    if not 0 < share < 1:
        raise ValueError(f"the share held out must lie in (0, 1), got {share}")
    if len(names) < 2:
        raise ValueError(
            f"{what} has {len(names)} image, too few to hold one out; expected a test subfolder "
            "or more images"
        )
    digests = (hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest() for name in names)
    place = np.array([int.from_bytes(digest[:8], "big") / 2**64 for digest in digests])
    chosen = place < share
    if chosen.all() or not chosen.any():
        chosen = place == place.min()
    return chosen


def _read_one(root: Path, several: bool = True) -> Listing:
    """All images of a folder without splits, or of one split."""
    every = set(_files(root))
    files = _images(every)
    path = _metadata(root)
    if path:
        return _read_metadata(path, files)
    if not files:
        raise FileNotFoundError(
            f"no images in {root} or below; expected files that end in {', '.join(images.SUFFIXES)}"
        )
    texts = [file.rpartition(".")[0] + TEXT for file in files]
    beside = [text in every for text in texts]
    if any(beside):
        if not all(beside):
            raise FileNotFoundError(
                f"{root} has captions beside images ({texts[beside.index(True)]}), but not beside "
                f"{files[beside.index(False)]}; expected {texts[beside.index(False)]}"
            )
        return Listing(root, tuple(files), captions=tuple(_caption(root / text) for text in texts))
    top = [file.partition("/")[0] if "/" in file else "" for file in files]
    names = sorted(set(top))
    if names == [""]:
        return Listing(root, tuple(files))
    if "" in names:
        raise ValueError(
            f"{root} has images both in subfolders ({names[1]}, ...), which are classes, and "
            f"beside them ({files[top.index('')]}); move the latter, or write {METADATA}"
        )
    if len(names) < 2 and several:
        raise ValueError(
            f"{root} has one class subfolder only, {names[0]!r}; expected at least two, or images "
            f"without subfolders (config.data.dir={root / names[0]})"
        )
    label = np.array([names.index(name) for name in top], np.int32)
    return Listing(root, tuple(files), label, tuple(names))


def _images(files: Iterable[str]) -> list[str]:
    return sorted(file for file in files if file.lower().endswith(images.SUFFIXES))


def _files(root: Path, below: str = "") -> Iterable[str]:
    with os.scandir(root / below) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _files(root, f"{below}{entry.name}/")
            elif entry.is_file() or entry.is_symlink():  # no pipe, which would block
                yield below + entry.name


def _metadata(root: Path) -> Path | None:
    found = [root / name for name in (METADATA, TABLE) if (root / name).exists()]
    if len(found) > 1:
        raise ValueError(f"{root} has both {METADATA} and {TABLE}; expected one of the two")
    return found[0] if found else None


def _caption(path: Path) -> str:
    return _text({TEXT: _decoded(path.read_bytes(), str(path))}, TEXT, str(path)).strip()


def _decoded(data: bytes, at: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{at} is not UTF-8 ({error.reason})") from None


def _lines(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    """(number, fields) of each line of a metadata file."""
    if path.name == METADATA:
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
            if line.strip():
                yield number, _parse(line, f"{path}, line {number}")
        return
    table = csv.DictReader(_decoded(path.read_bytes(), str(path)).splitlines(True), strict=True)
    try:
        for row in table:
            if None in row or None in row.values():
                raise ValueError(
                    f"{path}, line {table.line_num} has not as many fields as the header, "
                    f"{','.join(table.fieldnames)}; texts with commas need quotes"
                )
            if row.get("label", "").isdecimal() and len(row["label"]) < 10:
                row["label"] = int(row["label"])
            yield table.line_num, row
    except csv.Error as error:
        raise ValueError(f"{path}, line {table.line_num} is not CSV ({error})") from None


def _read_metadata(path: Path, files: Sequence[str]) -> Listing:
    root, there, seen = path.parent, set(files), {}
    rows: list[dict[str, Any]] = []
    for number, row in _lines(path):
        at = f"{path}, line {number}"
        names = tuple(
            _named(row, key, at, root, there)
            for key in ("file_name", EDITED)
            if key == "file_name" or key in row
        )
        if names in seen:
            raise ValueError(f"{at}: file_name={names[0]!r} is already in line {seen[names]}")
        seen[names] = number
        rows.append({**row, "at": at})
    if not rows:
        raise ValueError(f"{path} is empty; expected lines such as " + _EXAMPLE)
    key = next((key for key in CAPTIONS if any(key in row for row in rows)), None)
    captions = tuple(_text(row, key, row["at"]) for row in rows) if key else ()
    label, names = _labels(rows) if any("label" in row for row in rows) else (None, ())
    if label is None and not captions:
        raise ValueError(f"{path} has neither text, caption nor label; an example: {_EXAMPLE}")
    for pair, row in zip(seen, rows):
        if len(pair) != len(next(iter(seen))):
            raise ValueError(f"{row['at']}: expected {EDITED} in all lines, or in none")
    files, *edited = zip(*seen)
    return Listing(root, files, label, names, captions, *edited)


def _named(row: dict[str, Any], key: str, at: str, root: Path, there: Collection[str]) -> str:
    """A file that a line of metadata names, below its folder."""
    name = os.path.normpath(_text(row, key, at)).replace(os.sep, "/")
    if name.startswith(("../", "/")) or name == "..":
        raise ValueError(f"{at}: {key}={name!r} lies outside of {root}")
    if name not in there and not _is_file(root / name):
        raise FileNotFoundError(f"{at}: {key}={name!r}: there is no such file")
    return name


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long for the file system
        return False


_EXAMPLE = '{"file_name": "1.png", "text": "a red cat"}'


def _parse(line: bytes, at: str) -> dict[str, Any]:
    text = _decoded(line, at)
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{at} is not JSON ({error}); an example: {_EXAMPLE}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{at} is not a JSON object; an example: {_EXAMPLE}")
    return row


def _text(row: dict[str, Any], key: str, at: str) -> str:
    if key not in row:
        raise ValueError(f"{at}: {key} is missing; an example: {_EXAMPLE}")
    if not isinstance(row[key], str) or not row[key].strip():
        raise ValueError(f"{at}: {key} must be a non-empty text, got {row[key]!r}")
    return row[key]


def _labels(rows: Sequence[dict[str, Any]]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Class indices and names; numbers stay, names are numbered in alphabetical order."""
    kind = str if isinstance(rows[0].get("label"), str) else int
    for row in rows:
        value = row.get("label")
        wrong = not isinstance(value, kind) or isinstance(value, bool)
        if wrong or (kind is int and not 0 <= value < MOST_CLASSES):
            raise ValueError(
                f"{row['at']}: label must be a {'name' if kind is str else 'number from 0'} "
                f"as in the first line (of at most {MOST_CLASSES:,} classes), got {value!r}"
            )
    values = [row["label"] for row in rows]
    if kind is int:
        return np.array(values, np.int32), tuple(str(k) for k in range(max(values) + 1))
    names, label = np.unique(values, return_inverse=True)
    return label.astype(np.int32), tuple(names.tolist())


def _with_classes(listing: Listing, names: tuple[str, ...]) -> Listing:
    """The listing with the class indices of the training split."""
    unknown = sorted(set(listing.class_names) - set(names))
    if unknown:
        raise ValueError(f"{listing.root} has the class {unknown[0]!r}, which train lacks")
    if listing.label is None:
        return listing
    number = np.array([names.index(name) for name in listing.class_names], np.int32)
    return dataclasses.replace(listing, label=number[listing.label], class_names=names)
