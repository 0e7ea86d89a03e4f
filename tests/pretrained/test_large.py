"""The full-size U-Net of Stable Diffusion 1.5 at 64 x 64 latents; not in the default run.

    python -m pytest -n 0 -m large tests/pretrained/test_large.py -s

needs 8 GB of memory and, on two cores, two minutes.
"""

import os
import time

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from test_diffusers_unet import randomised
from unet_cases import SD1

from diffusion.conditioning import Conditioning
from diffusion.pretrained.names import from_tensors
from diffusion.pretrained.networks import unet

X, CONTEXT = (np.random.default_rng(0).normal(size=s) for s in ((1, 64, 64, 4), (1, 77, 768)))
X, CONTEXT, AT = X.astype(np.float32), CONTEXT.astype(np.float32), np.array([500.0], np.float32)


@pytest.mark.large
def test_full_size_unet():
    # What is no longer needed goes before the next gigabytes come.
    theirs, tensors, their_seconds = diffusers_run()
    net = unet.from_config(SD1)
    shapes = jax.eval_shape(net.init, jax.random.key(0), *unet.example(net))["params"]
    params = from_tensors(unet.names(net), shapes, tensors, jnp.array)
    tensors.clear()
    cond = Conditioning(context=jnp.asarray(CONTEXT))
    apply = jax.jit(net.apply)
    call = lambda: np.asarray(apply({"params": params}, jnp.asarray(X), jnp.asarray(AT), cond))
    call()
    ours, seconds = timed(call)
    error = float(np.abs(ours - theirs).max())
    print(f"largest error {error:.1e}, std {theirs.std():.2g}; {seconds:.3g} s here,", end=" ")
    print(f"{their_seconds:.3g} s in diffusers")
    assert 0.3 < theirs.std() < 10
    assert error < 1e-4


def diffusers_run():
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = randomised(diffusers.UNet2DConditionModel.from_config(SD1))
    arguments = [torch.tensor(a) for a in (X.transpose(0, 3, 1, 2), AT, CONTEXT)]
    with torch.no_grad():
        output, seconds = timed(lambda: model(*arguments).sample.permute(0, 2, 3, 1).numpy())
    torch.set_num_threads(1)
    return output, model.state_dict(), seconds


def timed(call):
    began = time.perf_counter()
    return call(), time.perf_counter() - began
