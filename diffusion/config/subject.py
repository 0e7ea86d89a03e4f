"""From ``config.data`` to a subject and its class, DreamBooth's data."""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from diffusion.data import folder, subject
from diffusion.data.sources import Source
from diffusion.errors import field

AT = "config.data.subject."


def make_source(c: ConfigDict, split: str) -> Source:
    """The subject's pictures in ``c.dir`` and, of "train" alone, those of its class.

    Raises:
      ValueError, FileNotFoundError: the message names the field of config.data.
    """
    check(c)
    own, of_class = c.subject, ()
    with field(f"config.data.dir={c.dir!r}"):
        pictures = folder.pictures(c.dir)
        if not pictures:
            raise FileNotFoundError("it has no pictures")
    if own.class_dir and split == "train":
        of_class = class_pictures(c)
        if len(of_class) < own.class_count:
            raise FileNotFoundError(
                f"{AT}class_dir={own.class_dir!r} has {len(of_class)} of {own.class_count} "
                "pictures; training in one process draws the others by itself, and so does "
                "--mode=cache"
            )
    return subject.source(
        Path(c.dir).resolve().name,
        pictures,
        own.prompt,
        of_class,
        own.class_prompt,
        channels=c.channels or 3,
        background=tuple(c.background),
    )


def class_pictures(c: ConfigDict) -> tuple[Path, ...]:
    """The pictures of the class that are there, in order."""
    path = c.subject.class_dir
    return folder.pictures(path) if Path(path).is_dir() else ()


def check(c: ConfigDict) -> None:
    """Raises ValueError where the fields of config.data.subject cannot be."""
    own = c.subject
    if not c.dir:
        raise ValueError("config.data.dir must name the folder of the subject's pictures")
    if not own.prompt.strip():
        raise ValueError(
            f"{AT}prompt={own.prompt!r} must be what the subject is called, such as "
            "'a photo of sks dog'"
        )
    if bool(own.class_dir) != bool(own.class_prompt.strip()):
        raise ValueError(
            f"{AT}class_dir={own.class_dir!r}, {AT}class_prompt={own.class_prompt!r}: expected "
            "both, a folder and what its pictures are called ('a photo of a dog'), or neither"
        )
    if own.class_dir and own.class_count < 1:
        raise ValueError(f"{AT}class_count={own.class_count} must be at least 1")
    if own.class_dir:
        both = Path(c.dir).resolve(), Path(own.class_dir).resolve()
        if both[0].is_relative_to(both[1]) or both[1].is_relative_to(both[0]):
            raise ValueError(
                f"{AT}class_dir={own.class_dir!r} and config.data.dir={c.dir!r}: one folder holds "
                "the other, and pictures below a folder count; expected two apart"
            )
