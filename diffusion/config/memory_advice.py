"""Advice when memory runs out: how much was missing, and which fields reduce the need."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import jax
from ml_collections import ConfigDict

TRAINS = ("train", "profile")
LARGE = ("adam", "adamw", "muon")  # keep more than one number per parameter
AMOUNT = re.compile(r"(?:allocat\w*|Used)\D{0,40}?([\d.]+) ?(bytes|B|[KMGT]i?B?)\b")
UNITS = {"b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


class OutOfMemoryError(MemoryError):
    """A device or the host has not enough memory; the message says what would help."""


@contextmanager
def explained(config: ConfigDict, mode: str) -> Iterator[None]:
    """Turns XLA's and Python's errors of memory into one that names fields of the config."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise OutOfMemoryError(message(error, config, mode)) from error


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out (XLA has no class of its own for it)."""
    text = str(error).lower()
    exhausted = "resource_exhausted" in text or "out of memory" in text
    return isinstance(error, MemoryError) or exhausted


def requested(error: BaseException) -> float | None:
    """Bytes of the allocation that failed, if the message has them."""
    found = AMOUNT.search(str(error))
    return float(found[1].rstrip(".")) * UNITS[found[2][0].lower()] if found else None


def message(error: BaseException, config: ConfigDict, mode: str) -> str:
    """One sentence of what happened, then a line per field that would help, with its value."""
    on_host = isinstance(error, MemoryError)
    device = jax.local_devices()[0].device_kind
    where = "this process" if on_host or device == "cpu" else f"the {device}"
    size = requested(error)
    missing = f": an allocation of {size / 2**30:.3g} GiB failed" if size else ""
    lines = [f"out of memory: {where} has not enough{missing}. These fields reduce the need:"]
    helps = _generating(config) if mode == "generate" else _running(config, mode)
    lines += [f"config.{field}={_get(config, field)!r}: {hint}" for field, hint in helps]
    if device != "cpu" and not on_host:
        lines.append("XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 in the environment: JAX takes 0.75 else")
    if mode in TRAINS:
        lines.append("Checkpoints stay: the same command goes on from the last one.")
    return "\n  ".join(lines)


def _running(config: ConfigDict, mode: str) -> Iterator[tuple[str, str]]:
    name, devices = config.model.name, jax.device_count()
    if mode in TRAINS:
        yield "train.batch_size", "fewer examples"
        pieces = config.train.accumulate * devices
        if config.train.batch_size > pieces:
            yield "train.accumulate", "more pieces of a batch, one after another; the same update"
    if config.model.dtype in ("auto", "float32"):
        yield "model.dtype", "bfloat16 halves what is computed"
    if mode in TRAINS:
        remat = f"model.{name}.remat" if "remat" in config.model.get(name, {}) else "model.remat"
        if (name == "pretrained" or remat != "model.remat") and not _get(config, remat):
            yield remat, "True computes blocks anew in the backward pass"
        if config.get("parallel", "fsdp") != "fsdp" and devices > 1:
            yield "parallel", f"fsdp spreads parameters and optimiser over the {devices} devices"
        if config.optimizer.name in LARGE:
            yield "optimizer.name", "lion or sgd keep one number per parameter"
    if mode != "profile" and config.objective.name == "denoising":
        yield "sampler.batch_size", "fewer samples at a time"
        if "cfg(" in str(config.sampler.guidance) and "split" not in str(config.sampler.guidance):
            yield "sampler.guidance", "cfg with split=True makes two calls of half the batch"


def _generating(config: ConfigDict) -> Iterator[tuple[str, str]]:
    yield "sampler.batch_size", "fewer pictures at a time"
    on_cpu = jax.default_backend() == "cpu"
    if config.model.dtype == "float32" or (config.model.dtype == "auto" and on_cpu):
        yield "model.dtype", "bfloat16 halves everything"
    yield "model.tile", "pixels, as 512: decodes in tiles"
    yield "samples.height", "smaller pictures, with width"


def _get(config: ConfigDict, field: str):
    for part in field.split("."):
        config = config[part]
    return config
