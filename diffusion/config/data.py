"""From ``config.data`` to sources, and to the batches that training sees."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from diffusion import conditions, specs
from diffusion.config import captions, edits, latents, subject
from diffusion.data import arrays, buckets, folder, hints, image_source, mnist_cifar, sources, tfds
from diffusion.data import batches as pipeline
from diffusion.data.batches import CROPS, DTYPES, Augmentation
from diffusion.data.folder import Listing
from diffusion.data.sources import Batch, Source
from diffusion.data.tags import Tags
from diffusion.data.templates import Template
from diffusion.errors import field, wrong_types

WHOLE = ("digits", "mnist", "cifar10", "latents", "points")  # with splits and sizes of their own
STORED = ("folder", "arrays", "subject")  # and TFDS sets: in any size
NAMES = (*WHOLE, *STORED, *captions.PAIRS, "edits")
CHECKED = Path("~", ".cache", "diffusion-jax", "checked")  # what on_error=skip has found out


def make_source(c: ConfigDict, split: str) -> Source:
    """The data of config.data, "train" or "test": images, points, or cached latents of images."""
    images = source = make_images(c, split)
    if latents.needed(c):
        with field(f"config.data.cache={c.cache!r}"):
            source = latents.source(c, split, images)
    return _hinted(c, source, images) if c.hint else source


def _hinted(c: ConfigDict, source: Source, images: Source) -> Source:
    """With the hints of config.data.hint."""
    name = f"config.data.hint={c.hint!r}"
    if c.flip or c.crop != "center" or c.buckets:
        raise ValueError(
            f"{name} is of whole pictures: leave config.data.flip, crop and buckets as they are"
        )
    if images.view != "images":
        raise ValueError(f"{name} is read from pictures; config.data.name={c.name!r} has none")
    if c.hint == "given":
        if "image" not in images[0]:
            raise ValueError(
                f"{name}: hints are given by config.data.name='edits', as the pictures to edit"
            )
        return hints.with_images(source, images)
    with field(name), wrong_types():
        condition = specs.function(c.hint, conditions.CHOICES, "config.data.hint")
        condition(np.zeros((*images.shape[:2], 3), np.uint8))  # its options are checked in the call
    return hints.with_maps(source, images, condition)


def make_images(c: ConfigDict, split: str) -> Source:
    """The data of config.data before an autoencoder or text encoder has seen them.

    Raises:
      ValueError, FileNotFoundError: the message names the field.
    """
    return finished(c, stored(c, split), split)


def stored(c: ConfigDict, split: str) -> Source:
    """The data as they are stored: of folders, arrays and TFDS sets in any size, without tokens."""
    check(c)
    directory = c.dir or None
    with field(f"config.data.name={c.name!r}"):
        if c.name == "digits":
            return sources.digits(split)
        if c.name == "mnist":
            return mnist_cifar.mnist(split, directory, padding=c.padding)
        if c.name == "cifar10":
            return mnist_cifar.cifar10(split, directory)
        if c.name == "latents":
            if directory is None:
                raise ValueError("config.data.dir must name the .npz file of latents")
            return sources.latents(directory, scale=c.scale, num_classes=c.num_classes or None)
        if c.name == "points":
            return sources.points(c.density, seed=0 if split == "train" else 1)
        if c.name in captions.PAIRS:
            return captions.make_source(c, split)
        if c.name == "folder":
            return _folder(c, split)
        if c.name == "arrays":
            return _arrays(c, split)
        if c.name == "subject":
            return subject.make_source(c, split)
        if c.name == "edits":
            return edits.make_source(c, split)
        return tfds.source(c.name, split, directory, held_out=c.held_out, known=NAMES)


def finished(c: ConfigDict, source: Source, split: str) -> Source:
    """What is ``stored``, or a part of it, as config.data wants it."""
    if c.name in NAMES and c.name not in STORED:
        return source
    with field(f"config.data.name={c.name!r}"):
        if source.captions and c.tokenizer:
            train = source if split == "train" else stored(c, "train")
            source = captions.tokenized(c, source, train.captions)
        return _shaped(c, source, split)


def batches(
    config: ConfigDict,
    source: Source,
    start_step: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """What training sees from ``start_step`` on, as config.data says; see ``data.batches``."""
    c = config.data
    with field("config.data"):
        return pipeline.batches(
            source,
            config.train.batch_size,
            config.seed,
            start_step,
            process_index=process_index,
            process_count=process_count,
            augmentation=augmentation(c),
            num_threads=c.threads,
            prefetch=c.prefetch,
            workers=c.workers,
        )


def augmentation(c: ConfigDict) -> Augmentation:
    """Of config.data.

    Raises:
      ValueError: its fields do not fit together; the message names them.
    """
    rewrite = None
    if c.template:
        with field(f"config.data.template={c.template!r}"):
            rewrite = Template(c.template)
            if c.shuffle_tags or c.keep_tags or c.tag_dropout:
                raise ValueError(
                    "its sentences are no tags: shuffle_tags, keep_tags and tag_dropout"
                )
    elif c.shuffle_tags or c.keep_tags or c.tag_dropout:
        with field("config.data.shuffle_tags, keep_tags, tag_dropout"):
            rewrite = Tags(c.shuffle_tags, c.keep_tags, c.tag_dropout)
            if c.text_encoder and c.workers:
                raise ValueError(
                    f"config.data.workers={c.workers}: changed captions are embedded by "
                    "config.data.text_encoder, which this process has; expected 0"
                )
    return Augmentation(flip=c.flip, crop=c.crop, captions=rewrite, dtype=c.dtype)


def check(c: ConfigDict) -> None:
    """Raises ValueError where a field of config.data cannot be."""
    if not c.name:
        raise ValueError(
            f"config.data.name is empty; choose one of {', '.join(NAMES)}, or a set of TFDS"
        )
    for name, valid in {
        "channels": (0, 1, 3),
        "on_error": ("raise", "skip"),
        "crop": CROPS,
        "dtype": tuple(DTYPES),
    }.items():
        if c[name] not in valid:
            if isinstance(c[name], str):
                raise specs.unknown(f"config.data.{name}", c[name], valid)
            raise ValueError(f"config.data.{name}={c[name]}; choose one of {valid}")
    if c.name not in WHOLE and not 0 < c.held_out < 1:
        raise ValueError(f"config.data.held_out must lie in (0, 1), got {c.held_out}")
    if c.buckets:
        _shapes(c)
    if c.on_error == "skip" and c.name != "folder":
        raise ValueError("config.data.on_error=skip is for config.data.name=folder")


def _shapes(c: ConfigDict) -> tuple[buckets.Shape, ...]:
    """Of config.data.buckets."""
    if c.name in NAMES and c.name not in STORED:
        raise ValueError(
            f"config.data.buckets={c.buckets!r}: {c.name} has images of one size; they are for "
            "folder, arrays and TFDS sets"
        )
    if c.name == "subject":
        raise ValueError(
            f"config.data.buckets={c.buckets!r}: half of each batch is of the subject, half of its "
            "class, and pictures of both are squares; expected ''"
        )
    if c.size < 1:
        raise ValueError(f"config.data.buckets={c.buckets!r} needs config.data.size, of the square")
    shapes = specs.function(c.buckets, buckets.CHOICES, "config.data.buckets", filled=("size",))
    with field(f"config.data.buckets={c.buckets!r}"):
        return shapes(c.size)


def _arrays(c: ConfigDict, split: str) -> Source:
    if not c.dir:
        raise ValueError("config.data.dir must name an .npz, an .npy or a folder of .npy")
    name = Path(c.dir).resolve().stem
    with field(f"config.data.dir={c.dir!r}"):
        return arrays.source(name, c.dir, split, c.held_out, background=tuple(c.background))


def _folder(c: ConfigDict, split: str) -> Source:
    if not c.dir:
        raise ValueError("config.data.dir must name the folder of images")
    with field(f"config.data.dir={c.dir!r}"):
        listing = folder.read(c.dir, split, c.held_out)
        if c.on_error == "skip":
            bad = unreadable(listing)
            keep = np.array([i not in bad for i in range(len(listing))], bool)
            if not keep.any():
                raise ValueError(
                    f"none of the {len(listing)} images of the split {split} can be read"
                )
            listing = listing.take(keep)
        made = image_source.from_pictures(
            Path(c.dir).resolve().name,
            listing.pictures,
            (0, 0, c.channels or 3),
            class_names=listing.class_names,
        )
        return dataclasses.replace(made, captions=listing.captions)


def unreadable(listing: Listing) -> dict[int, str]:
    """Which images of a folder cannot be decoded, and why; a line on stderr names each.

    All are decoded once. The result is remembered until a file changes.
    """
    digest = hashlib.sha256()
    for i, name in enumerate(listing.files):
        stat = os.stat(listing.pictures.get(i))
        digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(errors="replace"))
    digest.update(str(listing.root.resolve()).encode(errors="replace"))
    path = CHECKED.expanduser() / f"{digest.hexdigest()[:32]}.json"
    if path.exists():
        bad = {int(i): cause for i, cause in json.loads(path.read_text()).items()}
    else:
        bad = image_source.damaged(listing.pictures, progress=sys.stderr.isatty())
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_path = path.with_suffix(f".{os.getpid()}.partial")
        partial_path.write_text(json.dumps(bad))
        partial_path.replace(path)
    for i, cause in bad.items():
        print(f"left out: {listing.pictures.name(i)}: {cause}", file=sys.stderr)
    return bad


def _shaped(c: ConfigDict, source: Source, split: str) -> Source:
    """In the size, channels and buckets of the config."""
    height, width, channels = source.shape
    channels = c.channels or channels
    if source.pictures is None:  # floats
        if (c.size and (c.size, c.size) != (height, width)) or channels != source.shape[-1]:
            raise ValueError(
                f"config.data.size={c.size}, channels={c.channels}: floats {source.shape} are "
                "taken as they are; uint8 can be resized"
            )
        if c.buckets:
            raise ValueError("config.data.buckets: floats are taken as they are; expected uint8")
        return source
    scan = partial(image_source.sizes, source.pictures, progress=sys.stderr.isatty())
    found = None
    if c.size:
        height = width = c.size
    elif 0 in source.shape:
        found = scan()
        if len(np.unique(found, axis=0)) > 1:
            other = int(np.flatnonzero((found != found[0]).any(1))[0])
            raise ValueError(
                "config.data.size=0 takes images as they are, and they have several sizes: "
                + " and ".join(
                    f"{source.pictures.name(i)} {found[i][0]} x {found[i][1]}" for i in (0, other)
                )
                + "; set config.data.size"
            )
        height, width = found[0].tolist()
    shape = (height, width, channels)
    if shape != source.shape:
        source = image_source.resized(source, shape, tuple(c.background))
    if not c.buckets or split != "train":
        return source
    shapes = np.array(_shapes(c))
    found = scan() if found is None else found
    return image_source.in_buckets(
        source, shapes[buckets.nearest(found, shapes)], tuple(c.background)
    )
