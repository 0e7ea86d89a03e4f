"""Latents of images and embeddings of captions, computed once and read by training.

``config.data.autoencoder`` and ``config.data.text_encoder`` name folders as diffusers and
transformers save them, here or on the hub; ``config.data.cache`` is where the results lie.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from diffusion import pretrained
from diffusion.data import array_cache
from diffusion.data.sources import Batch, Source
from diffusion.errors import field
from diffusion.pipelines import description
from diffusion.pipelines.codec import KL
from diffusion.pipelines.conditioners import FrozenEncoder

SPLITS = ("train", "test")
INDIFFERENT = ("cache", "std", "flip", "scale", "dtype", "threads", "workers", "prefetch", "crop")
INDIFFERENT += ("hint",)
BATCH = 64  # images or captions that are encoded at once


def needed(c: ConfigDict) -> bool:
    """Whether the data are read from a cache, as encoders of config.data require."""
    return bool(c.autoencoder or c.text_encoder)


@cache
def codec(folder: str) -> tuple[KL, dict[str, Any]]:
    """The autoencoder in a folder as diffusers saves it, and its parameters.

    Raises:
      ValueError: the folder holds something else.
    """
    with field(f"config.data.autoencoder={folder!r}"):
        loaded = pretrained.load(description.located(folder), expected="AutoencoderKL")
    return KL(loaded.module), {"autoencoder": loaded.params}


def encode(folder: str, images: np.ndarray) -> Batch:
    """Images [B, H, W, 3] in [-1, 1] -> mean ``x`` and ``x_std`` of their latents."""
    net, params = codec(folder)
    mean, std = net.moments(params, images)
    return {"x": np.asarray(mean), "x_std": np.asarray(std)}


def given(folder: str, images: np.ndarray) -> np.ndarray:
    """The latents of images [B, H, W, 3] in [-1, 1] that are edited: the mode, unscaled."""
    net, params = codec(folder)
    return np.asarray(net.encode(params, images, scaled=False))


def check(c: ConfigDict) -> None:
    """Raises ValueError where the fields of config.data do not fit together."""
    if needed(c) and not c.cache:
        raise ValueError(
            "config.data.cache must name a folder for what config.data.autoencoder or text_encoder "
            "gives, which is computed once"
        )
    if c.flip and c.autoencoder:
        raise ValueError(
            "config.data.flip=True: latents of a mirrored image are not the mirrored latents"
        )
    if c.crop != "center" and c.autoencoder:
        raise ValueError(
            f"config.data.crop={c.crop!r}: latents are computed once, of the middle; choose center"
        )
    for name in ("autoencoder", "text_encoder"):
        with field(f"config.data.{name}={c[name]!r}"):
            if c[name] and not (description.located(c[name]) / "config.json").is_file():
                raise ValueError("there is no config.json")


def compute(c: ConfigDict, images: Callable[[str], Source]) -> None:
    """Computes what is not in the cache yet.

    Args:
      c: config.data.
      images: split -> the images, captioned or labelled.

    Raises:
      ValueError: the cache holds what was computed from something else.
    """
    check(c)
    about, folder = _about(c), Path(c.cache)
    options = {"batch_size": BATCH, "progress": sys.stderr.isatty()}
    encoder = _encoder(c)
    for split in SPLITS:
        data = images(split)
        for name, part in _parts(split, data).items():
            array_cache.compute(
                folder / name, len(part), partial(_rows, part, c.autoencoder), about, **options
            )
        if c.text_encoder:
            captions = unique(data)
            rows = partial(_embeddings, encoder, data.encode, captions)
            array_cache.compute(folder / f"{split}_captions", len(captions), rows, about, **options)


def source(c: ConfigDict, split: str, images: Source) -> Source:
    """``images`` as their latents, and their captions as embeddings, from the cache.

    A batch has the latents' mean ``x`` and their deviation ``x_std``, and what else the images'
    batches have; or, from a text encoder, ``context`` and ``pooled`` for ``tokens``.

    Raises:
      FileNotFoundError: nothing is cached.
      ValueError: what is cached was computed from something else.
    """
    check(c)
    about, folder = _about(c), Path(c.cache)
    try:
        tables = {
            name: array_cache.read(folder / name, about | {"count": len(part)})
            for name, part in _parts(split, images).items()
        }
        texts, number, encode, vocabulary = None, {}, images.encode, images.vocabulary
        if c.text_encoder:
            captions = unique(images)
            count = {"count": len(captions)}
            texts = array_cache.read(folder / f"{split}_captions", about | count)
            number = {caption: i for i, caption in enumerate(captions)}
            encoder = _encoder(c)
            encode, vocabulary = partial(_look_up, encoder, images.encode, number, texts), ()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"config.data.cache={c.cache!r} does not hold the {split} split; compute it with "
            "--mode=cache (training in one process does so by itself)"
        ) from None

    def cached(part: Source, read: Callable, shape: tuple[int, ...]) -> Source:
        if texts is not None:
            which = np.array([number[caption] for caption in part.captions])
            read = partial(_read_both, read, texts, which)
        return dataclasses.replace(
            part,
            shape=shape,
            levels=0 if c.autoencoder else part.levels,
            read=read,
            crop=None,
            encode=encode,
            vocabulary=vocabulary,
        )

    parts = [
        cached(part, partial(_read, rows), rows["x"].shape[1:])
        for part, rows in zip(_parts(split, images).values(), tables.values())
    ]
    if not images.buckets:
        return parts[0]
    factor = images.buckets[0].shape[0] // parts[0].shape[0]
    shape = (*(side // factor for side in images.shape[:2]), parts[0].shape[2])
    # Images are cached in the shapes of their buckets; square latents are computed on demand.
    whole = cached(images, partial(_rows, images, c.autoencoder), shape)
    return dataclasses.replace(whole, buckets=tuple(parts))


def _parts(split: str, images: Source) -> dict[str, Source]:
    """What lies in one table each: a split, or each of its buckets."""
    if not images.buckets:
        return {split: images}
    return {f"{split}_{part.shape[0]}x{part.shape[1]}": part for part in images.buckets}


def unique(source: Source) -> list[str]:
    """The empty caption, which stands for none, and the source's different captions."""
    return list(dict.fromkeys(("", *source.captions)))


def _encoder(c: ConfigDict) -> FrozenEncoder | None:
    return FrozenEncoder(description.located(c.text_encoder)) if c.text_encoder else None


def _rows(images: Source, autoencoder: str, index: np.ndarray) -> Batch:
    batch = images.read(index)
    if not autoencoder:
        return batch
    edited = {"image": given(autoencoder, batch["image"])} if "image" in batch else {}
    return batch | encode(autoencoder, batch["x"]) | edited


def _read(rows: array_cache.Table, index: np.ndarray) -> Batch:
    return {name: np.array(values[index]) for name, values in rows.items()}


def _read_both(
    read: Callable, texts: array_cache.Table, which: np.ndarray, index: np.ndarray
) -> Batch:
    batch = read(index)
    for name in ("tokens", "context_mask"):  # of these the text encoder made its embeddings
        batch.pop(name, None)
    return batch | _read(texts, which[index])


def _embeddings(
    encoder: FrozenEncoder, tokenize: Callable, captions: Sequence[str], index: np.ndarray
) -> Batch:
    return encoder(tokenize([captions[i] for i in index])["tokens"])


def _look_up(
    encoder: FrozenEncoder,
    tokenize: Callable,
    number: dict[str, int],
    texts: array_cache.Table,
    captions: Sequence[str],
) -> Batch:
    """Embeddings of captions, of those in the table without the encoder."""
    if all(caption in number for caption in captions):
        return _read(texts, np.array([number[caption] for caption in captions]))
    return encoder(tokenize(captions)["tokens"])


def _about(c: ConfigDict) -> dict[str, Any]:
    """What the cache is computed from: the data's fields, and the models' contents."""
    fields = {k: v for k, v in c.to_dict().items() if k not in INDIFFERENT}
    for name in ("autoencoder", "text_encoder"):
        if c[name]:
            fields[name] = fingerprint(description.located(c[name]))
    return fields


def fingerprint(folder: str | Path) -> str:
    """Of a model folder's config and weights."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).iterdir()):
        if path.suffix in (".json", ".safetensors"):
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
