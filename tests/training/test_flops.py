from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from diffusion.conditioning import Conditioning
from diffusion.models import dit, unet
from diffusion.models.kernels.attention import attend, attend_in_blocks
from diffusion.models.kernels.convolution import direct
from diffusion.training import flops


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def forward(net, x, **signals):
    """FLOPs of one pass; nothing is computed, not even parameters."""
    args = shape(*x), shape(x[0]), Conditioning(**signals)
    params = jax.eval_shape(net.init, jax.random.key(0), *args)
    return flops.count(net.apply, params, *args)


def text(width, length=77):
    return shape(1, length, width)


XL = dit.DiT(**dit.preset("XL/2"), num_classes=1000, scan=True, learned_variance=True)
SDXL = dict(context=text(2048), pooled=shape(1, 1280), time_ids=shape(1, 6))


@pytest.mark.parametrize(
    "net, x, signals, published",
    [  # DiT: twice the 118.6 GMAC of Peebles & Xie (2023), table 4
        (XL, 32, {"label": 1}, 237.2),
        pytest.param(unet.ddpm_cifar10(), 32, {}, 12.44, marks=pytest.mark.large),
        (unet.sd15(), 64, {"context": text(768)}, 803),
        pytest.param(unet.sdxl(), 128, SDXL, 6761, marks=pytest.mark.large),  # 9 s of tracing
    ],
    ids=["DiT-XL/2", "DDPM", "SD 1.5", "SDXL"],
)
def test_published_networks(net, x, signals, published):
    if "label" in signals:
        signals = {"label": shape(1, dtype=jnp.int32)}
    channels = 3 if isinstance(net, unet.UNet) and not signals else 4
    with direct():
        count = forward(net, (1, x, x, channels), **signals)
    assert count / 1e9 == pytest.approx(published, rel=2e-3)


def test_forms_with_fewer_products_count_as_what_they_are():
    with direct():
        plain = forward(unet.ddpm_cifar10(), (1, 64, 64, 3))
    fewer = forward(unet.ddpm_cifar10(), (1, 64, 64, 3))
    assert 0.5 * plain < fewer < 0.8 * plain  # 4 / 9 of most convolutions


def test_scanned_and_unrolled_blocks_count_the_same():
    label = shape(2, dtype=jnp.int32)
    counts = {
        forward(
            dit.DiT(width=16, depth=5, heads=2, patch=2, num_classes=3, scan=scan, remat=remat),
            (2, 8, 8, 4),
            label=label,
        )
        for scan in (False, True)
        for remat in (False, True)
    }
    assert len(counts) == 1


def test_convolutions_by_hand():
    def conv(features, strides=1, groups=1):
        return nn.Conv(features, (3, 3), strides, feature_group_count=groups, use_bias=False)

    x = shape(2, 8, 8, 4)
    for layer, expected in [
        (conv(6), 2 * 2 * 64 * 9 * 4 * 6),
        (conv(6, 2), 2 * 2 * 16 * 9 * 4 * 6),
        (conv(6, groups=2), 2 * 2 * 64 * 9 * 2 * 6),
        (nn.ConvTranspose(6, (2, 2), (2, 2), use_bias=False), 2 * 2 * 64 * 4 * 4 * 6),
    ]:
        params = jax.eval_shape(layer.init, jax.random.key(0), x)
        assert flops.count(layer.apply, params, x) == expected
        # Backwards: as much for the kernel's gradient, as much for the input's. (Of a kernel as
        # wide as its stride nothing is padded; else the padding differs a little.)
        gradient = jax.grad(lambda p, x, f=layer.apply: jnp.sum(f(p, x) ** 2), argnums=(0, 1))
        assert flops.count(gradient, params, x) == 3 * expected


def test_loops_branches_and_devices():
    a = shape(3, 3)
    one = 2 * 27

    def power(x, **how):
        return jax.lax.scan(lambda c, _: (jnp.tanh(c @ c), None), x, None, length=5, **how)[0]

    assert flops.count(power, a) == flops.count(partial(power, unroll=5), a) == 5 * one
    again = jax.checkpoint(power)
    assert flops.count(jax.grad(lambda x: power(x).sum()), a) == 15 * one
    assert flops.count(jax.grad(lambda x: again(x).sum()), a) == 20 * one  # and once more forward
    assert flops.count(lambda x: jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ c, x), a)
    assert flops.count(jax.nn.relu, a) == 0
    branches = [lambda x: x, lambda x: x @ x, lambda x: x @ x @ x]
    assert flops.count(lambda i, x: jax.lax.switch(i, branches, x), 1, a) == 2 * one
    devices = jax.devices()[:4]
    pieces = shape(4, 3, 3)
    assert flops.count(jax.pmap(lambda x: x @ x, devices=devices), pieces) == 4 * one
    mesh, spec = Mesh(np.array(devices), ("data",)), PartitionSpec("data")
    mapped = jax.shard_map(lambda x: x @ x[0], mesh=mesh, in_specs=spec, out_specs=spec)
    assert flops.count(mapped, pieces) == 4 * one


def test_attention_in_blocks_counts_as_attention():
    q, k = shape(2, 6, 3, 8), shape(2, 5, 3, 8)
    expected = 2 * 2 * (2 * 3 * 6 * 5 * 8)
    assert flops.count(attend, q, k, k) == expected
    assert flops.count(partial(attend_in_blocks, entries=10), q, k, k) == expected  # three blocks


def test_peaks():
    assert flops.peak("NVIDIA H200") == 989.4e12
    assert flops.peak("NVIDIA H100 80GB HBM3", "float32") == 494.7e12
    assert flops.peak("NVIDIA A100-SXM4-80GB") == 312e12
    assert flops.peak("TPU v5 lite") == 197e12 and flops.peak("TPU v5p") == 459e12
    assert flops.peak("cpu") is None
