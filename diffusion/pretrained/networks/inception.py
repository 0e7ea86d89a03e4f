"""Inception-v3's weights: the published network of FID in its formats, and nsfwjs's."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.data.sources import read_npz
from diffusion.models.inception import STEM, Inception, Layer, blocks
from diffusion.pretrained import files, weights
from diffusion.pretrained.files import Tensor, Tensors
from diffusion.pretrained.names import Names, substituted
from diffusion.pretrained.tensorflow_graph import constants

NAMES = Names(substituted(("/", ".")), ignored=r".*\.num_batches_tracked|AuxLogits\..*")
"""The keys of pytorch-fid and torch-fidelity: ``Mixed_6d.branch1x1.conv.weight``, ``.bn.weight``,
``.bn.bias``, ``.bn.running_mean``, ``.bn.running_var``; ``fc.weight``, ``fc.bias``."""

LEAVES = {
    "conv.weight": "conv2d_params",
    "bn.weight": "batchnorm/gamma",
    "bn.bias": "batchnorm/beta",
    "bn.running_mean": "batchnorm/moving_mean",
    "bn.running_var": "batchnorm/moving_variance",
}
"""What a unit's tensors are called in the graph."""
HEAD = {"fc.weight": "softmax/weights", "fc.bias": "softmax/biases"}
KINDS = ".safetensors, .npz or .pb"


def load(path: str | Path, net: Inception) -> dict[str, Any]:
    """The parameters of ``net`` in a file of the user's.

    A file is one of
      ``.safetensors`` or ``.npz`` with the keys of ``NAMES``. pytorch-fid and torch-fidelity
        publish one network, ``pt_inception-2015-12-05-6726825d.pth``, as a pickle; the error for it
        shows how to convert it;
      ``.pb``, the graph that ADM's evaluator reads, ``classify_image_graph_def.pb``.

    NVIDIA publishes the same network as a program for TorchScript (``inception-2015-12-05.pt``) and
    as a pickle; take one of the files above in its place.

    Raises:
      FileNotFoundError, ValueError: there is no such file; it is a pickle or of another kind;
        tensors are missing, unexpected or misshapen.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    tensors = _tensors(path)
    return weights.load_params(NAMES, _shapes(net), tensors, what=str(path))


@cache
def _shapes(net: Inception) -> Any:
    image = jax.ShapeDtypeStruct((1, 75, 75, 3), jnp.float32)
    return jax.eval_shape(net.init, jax.random.key(0), image)["params"]


def _tensors(path: Path) -> Tensors:
    if path.suffix == ".npz":
        return {key: files.of_array(array) for key, array in read_npz(path).items()}
    if path.suffix == ".pb":
        return _of_graph(path)
    if path.suffix == ".safetensors":
        return files.open_file(path)
    if path.suffix in files.PICKLES:
        hint = "\nA program for TorchScript, as NVIDIA's inception-2015-12-05.pt, is no such file:"
        hint += " take pytorch-fid's or ADM's file of the same network instead."
        raise ValueError(f"{files.refuse_pickle(path)}{hint}")
    raise ValueError(f"{path}: Inception's weights are in a {KINDS} file, not {path.suffix!r}")


def units() -> Iterator[tuple[str, str]]:
    """(our name, the graph's name) of every convolution with its norm, in the order of the graph.

    In the graph a branch of one layer lies in its block, "mixed_4/conv"; the longer ones are
    towers, "mixed_4/tower/conv", "mixed_4/tower/conv_1"; layers side by side are in a block of
    their own, "mixed_9/tower/mixed/conv_1".
    """
    for i, layer in enumerate(filter(None, STEM)):
        yield layer.name, _numbered("conv", i)
    for i, (block, (branches, pool, _)) in enumerate(blocks("max").items()):
        prefix, towers = _numbered("mixed", i), 0
        for chain in branches:
            inside = prefix
            if len(chain) > 1:
                inside, towers = f"{prefix}/{_numbered('tower', towers)}", towers + 1
            for k, step in enumerate(chain):
                if isinstance(step, Layer):
                    yield f"{block}.{step.name}", f"{inside}/{_numbered('conv', k)}"
                    continue
                for n, layer in enumerate(step):
                    yield f"{block}.{layer.name}", f"{inside}/mixed/{_numbered('conv', n)}"
        if pool != "stride":
            yield f"{block}.branch_pool", f"{prefix}/{_numbered('tower', towers)}/conv"


def _numbered(name: str, i: int) -> str:
    return f"{name}_{i}" if i else name


def _of_graph(path: Path) -> Tensors:
    """The graph's tensors by the keys and in the layouts of ``NAMES``; others are passed over."""
    stored = constants(path)
    table = {f"{ours}.{a}": f"{theirs}/{b}" for ours, theirs in units() for a, b in LEAVES.items()}
    table |= HEAD
    missing = [name for name in table.values() if name not in stored]
    if missing:
        raise ValueError(
            f"{path} does not hold the graph of 2015-12-05: of its {len(table)} tensors"
            f" {len(missing)} are missing: {', '.join(missing[:10])}"
            + (", ..." if len(missing) > 10 else "")
        )
    return {key: _transposed(stored[name]) for key, name in table.items()}


def _transposed(tensor: Tensor) -> Tensor:
    """Kernels [h, w, in, out] or [in, out] as PyTorch's [out, in, h, w] or [out, in]."""
    order = {4: (3, 2, 0, 1), 2: (1, 0)}.get(len(tensor.shape), range(len(tensor.shape)))
    return files.of_array(tensor.read().transpose(*order))


def convert_nsfwjs(folder: str | Path, path: str | Path) -> None:
    """Writes the Inception-v3 of npm's nsfwjs 4.4.0 (MIT) to a ``.safetensors`` file.

        npm pack nsfwjs@4.4.0 && tar xzf nsfwjs-4.4.0.tgz

    gives the folder, ``package/dist/models/inception_v3``. Its weights are bytes with a factor and
    an offset per tensor, in Keras's order and layouts, without factors of the batch norms; the
    classifier on top is left out.
    """
    folder = Path(folder)
    shards = sorted(folder.glob("group1-shard*of*.min.js"))
    if not shards:
        raise FileNotFoundError(f"no file group1-shard*of*.min.js in {folder}")
    data = b"".join(
        base64.b64decode(max(re.findall(r'"([^"]*)"', shard.read_text()), key=len))
        for shard in shards
    )
    number = r"(-?[\d.e-]+)"
    entry = rf'name:"([^"]+)",shape:\[([\d,]*)\],dtype:"float32",quantization:{{min:{number},'
    entry += rf'scale:{number},dtype:"uint8"}}'
    stored, at = {}, 0
    for name, sides, low, scale in re.findall(entry, (folder / "model.min.js").read_text()):
        shape = tuple(map(int, sides.split(",")))
        size = int(np.prod(shape))
        values = np.frombuffer(data, np.uint8, size, at).reshape(shape)
        stored[name] = (values * np.float64(scale) + np.float64(low)).astype(np.float32)
        at += size
    if at != len(data):
        raise ValueError(f"{folder}: {len(data)} bytes of weights, {at} by the list of tensors")
    files.write_file(path, _of_keras(stored))


def _of_keras(stored: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Tensors by ``NAMES`` from Keras's, whose layers are numbered in the graph's order."""
    found = {}
    for i, (unit, _) in enumerate(units(), 1):
        kernel, norm = stored[f"conv2d_{i}/kernel"], f"batch_normalization_{i}"
        found[f"{unit}.conv.weight"] = np.ascontiguousarray(kernel.transpose(3, 2, 0, 1))
        found[f"{unit}.bn.weight"] = np.ones(kernel.shape[-1], np.float32)
        found[f"{unit}.bn.bias"] = stored[f"{norm}/beta"]
        found[f"{unit}.bn.running_mean"] = stored[f"{norm}/moving_mean"]
        found[f"{unit}.bn.running_var"] = stored[f"{norm}/moving_variance"]
    return {key: files.of_array(array) for key, array in found.items()}
