"""The networks that are measured, with their inputs and with weights that are cheap to make.

A case is one of our modules and its arguments; diffusers builds the same network from the
module's config and takes the same weights through the same name table (``diffusion.pretrained``).
Weights and inputs follow from a case alone, so that two processes have the same ones without a file
between them.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np

from diffusion.conditioning import Conditioning
from diffusion.models.autoencoder import AutoencoderKL
from diffusion.models.dit import DiT, preset
from diffusion.models.kernels import convolution
from diffusion.models.unet import UNet, ddpm_cifar10, sd15, sdxl
from diffusion.pretrained import models
from diffusion.training import flops

PERIOD = 2**20 - 3  # of the random numbers that weights are made of


@dataclass(frozen=True)
class Case:
    """A network and its inputs.

    Attributes:
      name: in tables.
      network: a UNet, DiT or AutoencoderKL in float32.
      shape: (H, W, C) of what goes in.
      batch: examples at once.
      signals: conditioning, name -> shape without the batch; label is an integer.
      forward, train: whether each is measured.
      variants: fields of the network for our side, by name ("remat": {"remat": True}).
      without: names of variants that are left out, for want of memory.
      settings: of a sampler: "scheduler" (a diffusers config), "steps" and, guided, "scale".
    """

    name: str
    network: nn.Module
    shape: tuple[int, int, int]
    batch: int
    signals: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    forward: bool = True
    train: bool = True
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def classes(self) -> int | None:
        """The number of labels."""
        return getattr(self.network, "num_classes", None)

    def inputs(self) -> dict[str, np.ndarray]:
        """x, times in [0, 1000) and conditioning, the same in every process."""
        rng = np.random.default_rng(1)
        found = {"x": rng.normal(size=(self.batch, *self.shape)).astype(np.float32)}
        found["time"] = rng.integers(0, 1000, self.batch).astype(np.float32)
        for name, shape in self.signals.items():
            size = (self.batch, *shape)
            if name == "label":
                found[name] = rng.integers(0, self.classes, size).astype(np.int32)
            elif name == "time_ids":
                found[name] = np.full(size, 1024, np.float32)
            else:
                found[name] = rng.normal(size=size).astype(np.float32)
        return found

    def flops(self) -> int:
        """FLOPs of a forward pass (of an autoencoder: of decoding), counted."""
        network = self.network.clone(attention_implementation="xla")
        arrays = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in self.inputs().items()}
        params = models.shapes(self.network)
        with convolution.direct():
            return flops.count(function(network), params, arrays)


def function(network: nn.Module) -> Callable[[Any, Mapping[str, jax.Array]], jax.Array]:
    """(params, inputs) -> output; of an autoencoder the image."""

    def call(params: Any, inputs: Mapping[str, jax.Array]) -> jax.Array:
        if isinstance(network, AutoencoderKL):
            return network.apply({"params": params}, inputs["x"], method="decode")
        cond = Conditioning(**{k: v for k, v in inputs.items() if k not in ("x", "time")})
        return network.apply({"params": params}, inputs["x"], inputs["time"], cond)

    return call


def weights(network: nn.Module) -> dict:
    """Random parameters: kernels of variance 1 / fan-in, others small; norms' scales around 1.

    Cut from one stretch of random numbers, which takes seconds for 2.6 G of them.
    """
    pool = np.random.default_rng(0).standard_normal(PERIOD, dtype=np.float32)
    flat = flax.traverse_util.flatten_dict(models.shapes(network), sep="/")
    filled = {}
    for path, leaf in flat.items():
        start = zlib.crc32(path.encode()) % PERIOD
        values = np.resize(pool, start + leaf.size)[start:].reshape(leaf.shape)
        kernel = leaf.ndim >= 2 and not path.endswith("embedding")
        values *= np.prod(leaf.shape[:-1]) ** -0.5 if kernel else 0.1
        filled[path] = values + 1 if path.endswith("scale") else values
    return flax.traverse_util.unflatten_dict(filled, sep="/")


def _text(width: int, **others: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {"context": (77, width), **others}


SD15 = sd15(in_channels=4, context_width=768, image_size=64)
SDXL = sdxl(in_channels=4, context_width=2048, added_width=2816, image_size=128)
SDXL_TEXT = _text(2048, pooled=(1280,), time_ids=(6,))
CIFAR10 = ddpm_cifar10(in_channels=3, image_size=32)
DIGITS = UNet(
    widths=(32, 64),
    blocks=1,
    attention=(0, "self"),
    num_heads=4,
    norm_groups=8,
    num_classes=10,
    in_channels=1,
    out_channels=1,
    image_size=8,
)
TINY = DIGITS.clone(widths=(16,), attention=("self",))
VAE = AutoencoderKL()
NOT_COMPILED = ("compile",)  # SD 1.5's by PyTorch on a CPU: it takes more than 14 GiB


def dit(**fields: Any) -> DiT:
    """A class-conditional DiT as diffusers has it."""
    own = {"num_classes": 1000, "in_channels": 4, "image_size": 32, "time_freq_shift": 1.0}
    return DiT(**{**own, **fields})


def networks(gpu: bool, small: bool) -> list[Case]:
    """U-Nets and DiTs for the device."""
    label = {"label": ()}
    if small:
        tiny_dit = dit(width=32, depth=2, heads=2, patch=2, image_size=8, num_classes=10)
        tiny_sd = sd15(
            widths=(16, 16), blocks=1, attention=(1, 0), num_heads=2, norm_groups=8
        ).clone(in_channels=4, context_width=12, image_size=8)
        return [
            Case("tiny U-Net", TINY, (8, 8, 1), 4, label),
            Case("tiny DiT", tiny_dit, (8, 8, 4), 2, label, variants={"scan": {"scan": True}}),
            Case("tiny SD", tiny_sd, (8, 8, 4), 1, {"context": (5, 12)}, train=False),
        ]
    if not gpu:
        return [
            Case("digits' U-Net", DIGITS, (8, 8, 1), 64, label),
            Case("DDPM's U-Net, CIFAR-10", CIFAR10, (32, 32, 3), 8),
            Case("DiT-S/2, 32 × 32 latents", dit(**preset("S/2")), (32, 32, 4), 4, label),
            Case(
                "SD 1.5's U-Net, 64 × 64",
                SD15,
                (64, 64, 4),
                1,
                _text(768),
                train=False,
                without=NOT_COMPILED,
            ),
        ]
    xl = dit(**preset("XL/2"), remat=True, remat_keeps_products=True)
    variants = {"scan": {"scan": True}, "nothing recomputed": {"remat": False}}
    return [
        Case("DiT-XL/2, 256 px", xl, (32, 32, 4), 256, label, variants=variants),
        Case("DDPM's U-Net, CIFAR-10", CIFAR10, (32, 32, 3), 256),
        *(
            case
            for batch in (1, 4, 16)
            for case in (
                Case("SD 1.5's U-Net, 64 × 64", SD15, (64, 64, 4), batch, _text(768), train=False),
                Case("SDXL's U-Net, 128 × 128", SDXL, (128, 128, 4), batch, SDXL_TEXT, train=False),
            )
        ),
    ]


def decoders(gpu: bool, small: bool) -> list[Case]:
    """Stable Diffusion's decoder at two sizes of images."""
    network, sizes = VAE, (512, 1024) if gpu else (256, 512)
    if small:
        network, sizes = AutoencoderKL(widths=(16, 16), blocks=1, norm_groups=8), (8, 16)
    return [
        Case(
            f"decoder, {size} × {size}",
            network,
            (size // network.factor, size // network.factor, network.latent_channels),
            1,
            train=False,
        )
        for size in sizes
    ]


DDIM = {"_class_name": "DDIMScheduler", "clip_sample": False}
DPM_SOLVER = {
    "_class_name": "DPMSolverMultistepScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


def samplers(gpu: bool, small: bool) -> list[Case]:
    """Networks and the samplers around them."""
    guided = {"scheduler": DPM_SOLVER, "steps": 4 if small else 20 if gpu else 8, "scale": 7.5}
    plain = {"scheduler": DDIM, "steps": 4 if small else 50 if gpu else 10}
    label = {"label": ()}
    if small:
        tiny = {case.name: case for case in networks(gpu, small)}
        return [
            replace(tiny["tiny U-Net"], name="tiny U-Net, DDIM", settings=plain),
            replace(tiny["tiny SD"], name="tiny SD, DPM-Solver++, guided", settings=guided),
        ]
    cifar, side = "DDPM's U-Net, CIFAR-10, DDIM", 64 if gpu else 16
    found = [
        Case("digits' U-Net, DDIM", DIGITS, (8, 8, 1), 64, label, settings=plain),
        Case(cifar, CIFAR10, (32, 32, 3), 64 if gpu else 4, settings=plain),
    ]
    text = f"SD 1.5's U-Net, {side} × {side}, DPM-Solver++, guided"
    without = () if gpu else NOT_COMPILED
    found.append(Case(text, SD15, (side, side, 4), 1, _text(768), settings=guided, without=without))
    if gpu:
        text = "SDXL's U-Net, 128 × 128, DPM-Solver++, guided"
        found.append(Case(text, SDXL, (128, 128, 4), 1, SDXL_TEXT, settings=guided))
        found.reverse()
    return found
