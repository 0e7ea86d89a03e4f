"""Files of Inception's weights: keys of PyTorch, the graph of TensorFlow, what is refused."""

import os
import struct
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from diffusion.evaluation.networks.inception import inception, nsfwjs
from diffusion.models.inception import Inception
from diffusion.pretrained.names import bind, to_tensors
from diffusion.pretrained.networks import inception as files
from diffusion.pretrained.tensorflow_graph import constants

SHARED = Path(__file__).resolve().parents[3] / "shared"
ORACLE = SHARED / "data/weights/inception_nsfwjs_oracle.npz"
CONVERTED = "INCEPTION_NSFWJS"  # environment variable: the file that convert_nsfwjs wrote
GRAPH = {  # places in the graph that fix the order of branches, as TensorFlow lists them
    "Conv2d_4a_3x3": "conv_4",
    "Mixed_5b.branch5x5_2": "mixed/tower/conv_1",
    "Mixed_5d.branch3x3dbl_3": "mixed_2/tower_1/conv_2",
    "Mixed_5c.branch_pool": "mixed_1/tower_2/conv",
    "Mixed_6a.branch3x3": "mixed_3/conv",
    "Mixed_6a.branch3x3dbl_3": "mixed_3/tower/conv_2",
    "Mixed_6d.branch1x1": "mixed_6/conv",
    "Mixed_6e.branch7x7_3": "mixed_7/tower/conv_2",
    "Mixed_6e.branch7x7dbl_5": "mixed_7/tower_1/conv_4",
    "Mixed_7a.branch3x3_2": "mixed_8/tower/conv_1",
    "Mixed_7a.branch7x7x3_4": "mixed_8/tower_1/conv_3",
    "Mixed_7b.branch3x3_2b": "mixed_9/tower/mixed/conv_1",
    "Mixed_7c.branch3x3dbl_3a": "mixed_10/tower_1/mixed/conv",
    "Mixed_7c.branch_pool": "mixed_10/tower_2/conv",
}


def varint(n):
    return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)


def field(number, value):
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def node(name, array, listed=False, kind=1):
    """A constant's NodeDef, with a device and another attribute as TensorFlow has them."""
    shape = b"".join(field(2, field(1, n)) for n in array.shape)
    data = field(5 if listed else 4, array.astype("<f4").tobytes())
    tensor = field(1, kind) + field(2, shape) + data
    attributes = {b"dtype": field(6, kind), b"value": field(8, tensor)}
    body = field(1, name.encode()) + field(2, b"Const") + field(4, b"/cpu:0")
    for key, value in attributes.items():
        body += field(5, field(1, key) + field(2, value))
    return field(1, body)


def other(name):
    """A node that holds no constant."""
    return field(1, field(1, name.encode()) + field(2, b"Conv2D") + field(3, b"x"))


@pytest.fixture(scope="module")
def tensors():
    """Random tensors by PyTorch's keys."""
    image = jax.ShapeDtypeStruct((1, 75, 75, 3), jnp.float32)
    shapes = jax.eval_shape(Inception().init, jax.random.key(0), image)["params"]
    rng = np.random.default_rng(0)
    pairs = [
        pair for match in bind(files.NAMES, shapes) for pair in zip(match.theirs, match.shapes)
    ]
    return {key: rng.random(shape, np.float32) for key, shape in pairs}


def graph(tensors):
    """The same as the graph has them."""
    found = {}
    for ours, theirs in files.units():
        found[f"{theirs}/conv2d_params"] = tensors[f"{ours}.conv.weight"].transpose(2, 3, 1, 0)
        for a, b in {
            **{"weight": "gamma", "bias": "beta"},
            **{"running_mean": "moving_mean", "running_var": "moving_variance"},
        }.items():
            found[f"{theirs}/batchnorm/{b}"] = tensors[f"{ours}.bn.{a}"]
    return found | {
        "softmax/weights": tensors["fc.weight"].T,
        "softmax/biases": tensors["fc.bias"],
    }


def same(params, tensors):
    found = dict(to_tensors(files.NAMES, params))
    assert found.keys() == tensors.keys()
    assert all(np.array_equal(found[key], tensors[key]) for key in found)


def test_units_have_the_names_of_the_graph():
    units = dict(files.units())
    assert len(units) == len(set(units.values())) == 94
    assert {key: units[key] for key in GRAPH} == GRAPH


def test_is_read_from_every_format(tensors, tmp_path):
    counters = {"Conv2d_1a_3x3.bn.num_batches_tracked": np.zeros((), np.int64)}
    path = tmp_path / "weights.safetensors"
    safetensors.numpy.save_file(tensors | counters, path)
    same(files.load(path, Inception()), tensors)
    with (tmp_path / "graph.pb").open("wb") as file:
        file.write(other("DecodeJpeg") + node("pool_3/_reshape/shape", np.ones(2), kind=3))
        for i, (name, array) in enumerate(graph(tensors).items()):
            file.write(node(name, array, listed=i % 5 == 0) + other(f"{name}/read"))
    same(files.load(tmp_path / "graph.pb", Inception()), tensors)
    small = {key: array for key, array in tensors.items() if not key.startswith("fc")}
    np.savez(tmp_path / "weights.npz", **small)
    same(files.load(tmp_path / "weights.npz", Inception(0, "mean")), small)
    with pytest.raises(ValueError, match=r"2 missing: fc\.bias, fc\.weight"):
        files.load(tmp_path / "weights.npz", Inception())
    other_head = small | {"fc.weight": tensors["fc.weight"][:1000], "fc.bias": tensors["fc.bias"]}
    np.savez(tmp_path / "weights.npz", **other_head, more=np.ones(1))
    with pytest.raises(ValueError, match=r"(?s)1 unexpected: more.*fc.weight \(1000, 2048\), exp"):
        files.load(tmp_path / "weights.npz", Inception())


def test_graphs_hold_floats_in_three_ways(tmp_path):
    path, array = tmp_path / "graph.pb", np.arange(6, dtype=np.float32).reshape(2, 3)
    one_by_one = b"".join(varint(5 << 3 | 5) + struct.pack("<f", x) for x in array.ravel())
    shape = b"".join(field(2, field(1, n)) for n in array.shape)
    value = field(8, field(1, 1) + field(2, shape) + one_by_one)
    last = field(1, b"c") + field(2, b"Const") + field(5, field(1, b"value") + field(2, value))
    path.write_bytes(node("a", array) + node("b", array, listed=True) + field(1, last))
    found = constants(path)
    assert list(found) == ["a", "b", "c"]
    assert all(np.array_equal(tensor.read(), array) for tensor in found.values())


def test_damaged_graphs_are_named(tmp_path):
    path, whole = tmp_path / "graph.pb", node("conv/conv2d_params", np.ones((3, 3), np.float32))
    for data, message in {
        whole[:-1]: r"graph\.pb is no TensorFlow graph, or is damaged",
        b"\x80": "is damaged",
        b"<html>": "is damaged",
        whole.replace(field(1, 3), field(1, 4)): r"shape \(4, 4\) has 9 numbers",
    }.items():
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            constants(path)
    path.write_bytes(whole)
    with pytest.raises(
        ValueError, match="of its 472 tensors 471 are missing: conv/batchnorm/gamma"
    ):
        files.load(path, Inception())


def test_pickles_are_refused_with_the_way_to_convert(tmp_path):
    path = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    path.write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match=r"(?s)save_file\(.*TorchScript.*pytorch-fid's or ADM's"):
        files.load(path, Inception())
    (tmp_path / "weights.h6").write_bytes(b"")
    with pytest.raises(ValueError, match=r"in a \.safetensors, \.npz or \.pb file, not '\.h6'"):
        files.load(tmp_path / "weights.h6", Inception())
    (tmp_path / "weights.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match=r"weights\.npz cannot be read"):
        files.load(tmp_path / "weights.npz", Inception())


def test_networks_check_their_options_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"inception needs the file of its weights.*'none\.pb'"):
        inception("none.pb")
    path = tmp_path / "weights.pb"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"unknown 'tff'; choose one of clean, tf, torch.*'tf'"):
        inception(str(path), resize="tff")
    names = [inception(str(path), resize).name for resize in ("tf", "clean", "torch")]
    assert names == ["inception2015", "inception2015_clean", "inception2015_torch"]


@pytest.mark.skipif(not os.environ.get(CONVERTED), reason=f"{CONVERTED} names no file")
def test_real_network_reproduces_its_oracle():
    stored = np.load(ORACLE)
    net = replace(nsfwjs(os.environ[CONVERTED]), batch=2)
    given = net(stored["images_uint8_nhwc"], [None] * 2)["features"]
    np.testing.assert_allclose(given, stored["pool3_2048"], rtol=0, atol=1e-4)
