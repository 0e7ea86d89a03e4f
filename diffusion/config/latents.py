"""Latents of images and embeddings of captions, computed once and read by training.

``config.data.autoencoder`` and ``config.data.text_encoder`` name folders as diffusers and
transformers save them, here or on the hub; ``config.data.cache`` is where the results lie.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion import pretrained
from diffusion.data import array_cache
from diffusion.data.sources import Batch, Source
from diffusion.errors import field
from diffusion.models.autoencoder import AutoencoderKL
from diffusion.models.clip import ClipText
from diffusion.pretrained import hub

SPLITS = ("train", "test")
INDIFFERENT = ("cache", "std", "flip", "scale", "dtype", "threads", "workers", "prefetch", "crop")
BATCH = 64  # images or captions that are encoded at once


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """An autoencoder of images, read when it is first used.

    Attributes:
      folder: as diffusers saves it.
    """

    folder: str

    @cached_property
    def loaded(self) -> tuple[AutoencoderKL, Any]:
        """The module and its parameters.

        Raises:
          ValueError: the folder holds something else.
        """
        with field(f"config.data.autoencoder={self.folder!r}"):
            folder = located(self.folder, "config.data.autoencoder")
            return pretrained.load(folder, expected="AutoencoderKL")[:2]

    def encode(self, images: np.ndarray) -> Batch:
        """Images [B, H, W, 3] in [-1, 1] -> mean ``x`` and ``x_std`` of their latents."""
        x, std = _encode(self.loaded[0], self.loaded[1], images)
        return {"x": np.asarray(x), "x_std": np.asarray(std)}

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Latents [..., h, w, C] -> images [..., H, W, 3], about in [-1, 1]."""
        flat = np.asarray(latents, np.float32).reshape(-1, *latents.shape[-3:])
        images = []
        for start in range(0, len(flat), BATCH):
            index = np.minimum(np.arange(start, start + BATCH), len(flat) - 1)
            images.append(np.asarray(_decode(*self.loaded, flat[index]))[: len(flat) - start])
        images = np.concatenate(images)
        return images.reshape(*latents.shape[:-3], *images.shape[1:])


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """A frozen encoder of captions, read when it is first used.

    Attributes:
      folder: as transformers saves it.
    """

    folder: str

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        """The module and its parameters."""
        with field(f"config.data.text_encoder={self.folder!r}"):
            folder = located(self.folder, "config.data.text_encoder")
            return pretrained.load(folder, expected="CLIPTextModel")[:2]

    def encode(self, tokens: np.ndarray) -> Batch:
        """Tokens [B, L] -> ``context`` [B, L, C] and ``pooled`` [B, C].

        No mask: like Stable Diffusion's, a network attends to the padding too.
        """
        context, pooled = _embed(*self.loaded, tokens)
        return {"context": np.asarray(context), "pooled": np.asarray(pooled)}


@partial(jax.jit, static_argnums=0)
def _encode(net: AutoencoderKL, params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    moments = net.apply({"params": params}, images, method="encode")
    mean = net.to_latents(moments.mean)
    # to_latents is affine: a deviation is what it makes of the difference.
    above = net.to_latents(moments.mean + jnp.exp(0.5 * moments.log_variance))
    return mean, above - mean


@partial(jax.jit, static_argnums=0)
def _embed(net: ClipText, params: Any, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    encoded = net.apply({"params": params}, tokens)
    return encoded.last, encoded.pooled


@partial(jax.jit, static_argnums=0)
def _decode(net: AutoencoderKL, params: Any, latents: jax.Array) -> jax.Array:
    return net.apply({"params": params}, net.from_latents(latents), method="decode")


def wanted(c: ConfigDict) -> bool:
    """Whether config.data is to be read from a cache."""
    return bool(c.autoencoder or c.text_encoder)


def autoencoder(c: ConfigDict) -> Autoencoder | None:
    """That of config.data, not read yet; None if there is none."""
    return Autoencoder(c.autoencoder) if c.autoencoder else None


def check(c: ConfigDict) -> None:
    """Raises ValueError where the fields of config.data do not fit together."""
    if wanted(c) and not c.cache:
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
        if c[name] and not (located(c[name], f"config.data.{name}") / "config.json").is_file():
            raise ValueError(f"config.data.{name}={c[name]!r}: there is no config.json")


def located(path: str, name: str) -> Path:
    """A folder of this machine, or of a hub's pipeline: "owner/name/vae".

    Raises ValueError, naming the config's field, where there is none.
    """
    if Path(path).is_dir():
        return Path(path)
    pipeline, _, part = path.rpartition("/")
    if not pipeline:
        raise ValueError(f"{name}={path!r}: there is no such folder")
    try:
        return hub.locate(pipeline, part)
    except FileNotFoundError as error:
        raise ValueError(f"{name}={path!r}: {error}") from error


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
    net, encoder = autoencoder(c), TextEncoder(c.text_encoder)
    for split in SPLITS:
        data = images(split)
        for name, part in _parts(split, data).items():
            array_cache.compute(
                folder / name, len(part), partial(_rows, part, net), about, **options
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
            encoder = TextEncoder(c.text_encoder)
            encode, vocabulary = partial(_look_up, encoder, images.encode, number, texts), 0
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
    # Whole images in their own shapes are cached; squares of them are computed when asked for.
    whole = cached(images, partial(_rows, images, autoencoder(c)), shape)
    return dataclasses.replace(whole, buckets=tuple(parts))


def _parts(split: str, images: Source) -> dict[str, Source]:
    """What lies in one table each: a split, or each of its buckets."""
    if not images.buckets:
        return {split: images}
    return {f"{split}_{part.shape[0]}x{part.shape[1]}": part for part in images.buckets}


def unique(source: Source) -> list[str]:
    """The empty caption, which stands for none, and the source's different captions."""
    return list(dict.fromkeys(("", *source.captions)))


def _rows(images: Source, net: Autoencoder | None, index: np.ndarray) -> Batch:
    batch = images.read(index)
    return batch if net is None else batch | net.encode(batch["x"])


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
    encoder: TextEncoder, tokenize: Callable, captions: Sequence[str], index: np.ndarray
) -> Batch:
    return encoder.encode(tokenize([captions[i] for i in index])["tokens"])


def _look_up(
    encoder: TextEncoder,
    tokenize: Callable,
    number: dict[str, int],
    texts: array_cache.Table,
    captions: Sequence[str],
) -> Batch:
    """Embeddings of captions, of those in the table without the encoder."""
    if all(caption in number for caption in captions):
        return _read(texts, np.array([number[caption] for caption in captions]))
    return encoder.encode(tokenize(captions)["tokens"])


def _about(c: ConfigDict) -> dict[str, Any]:
    """What the cache is computed from: the data's fields, and the models' contents."""
    fields = {k: v for k, v in c.to_dict().items() if k not in INDIFFERENT}
    for name in ("autoencoder", "text_encoder"):
        if c[name]:
            fields[name] = fingerprint(located(c[name], f"config.data.{name}"))
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
