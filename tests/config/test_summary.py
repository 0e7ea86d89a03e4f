import re

import jax
import pytest
from jax.sharding import PartitionSpec

from configs import digits
from diffusion.config import summary
from diffusion.config.experiment import build
from diffusion.training import parallel


def described(workdir, layout="pmap", **fields):
    config = digits.get_config()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    experiment = build(config)
    found = summary.describe(experiment)
    shardings = parallel.make(layout, jax.devices()).shardings
    return found, summary.text(experiment, found, workdir, shardings).splitlines()


@pytest.fixture(scope="module")
def dit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dit")
    fields = dict(model__name="dit", model__dit__depth=1, model__dit__width=32)
    return *described(folder, **fields), (folder / "parameters.txt").read_text().splitlines()


def test_the_table_holds_every_parameter(dit):
    found, lines, table = dit
    leaves = jax.tree.leaves(found.state.params)
    count = sum(leaf.size for leaf in leaves)
    assert len(table) == len(leaves) + 1 and table[-1] == f"{count:,} in all"
    sizes = [int(re.search(r"\)\s+([\d,]+)", row)[1].replace(",", "")) for row in table[:-1]]
    assert sizes == [leaf.size for leaf in leaves]
    assert f"{count:,} parameters; 4 x cpu" in lines[0]
    modules = [int(row.split()[1].replace(",", "")) for row in lines[1:-1]]
    assert sum(modules) == count and len(modules) <= summary.ROWS


def test_work_and_memory(dit):
    found, lines, _ = dit
    assert f"{found.forward / 1e9:.3g} GFLOP per image forward" in lines[-1]
    parameters = 4 * sum(leaf.size for leaf in jax.tree.leaves(found.state.params)) / 1e6
    assert f"parameters {parameters:.3g} MB, optimiser {2 * parameters:.3g} MB" in lines[-1]
    assert summary.peak(digits.get_config()) is None  # nobody knows a CPU's


def test_many_blocks_are_one_row(tmp_path):
    fields = dict(model__name="dit", model__dit__depth=13, model__dit__width=32)
    _, lines = described(tmp_path, "fsdp", **fields)
    (row,) = (line for line in lines if "blocks_*" in line)
    assert "network/blocks_* (13)" in row
    assert len(lines) <= summary.ROWS + 2


def test_the_peak_can_be_given():
    config = digits.get_config()
    config.log.peak_tflops = 2.5
    assert summary.peak(config) == 2.5e12


def test_of_what_is_cut_each_device_holds_a_part():
    mesh = parallel.make("fsdp", jax.devices()[:4]).mesh
    tree = {"a": jax.ShapeDtypeStruct((8, 3), "float32"), "b": jax.ShapeDtypeStruct((5,), "int8")}
    at = {"a": PartitionSpec("data"), "b": PartitionSpec()}
    cut = lambda _: jax.tree.map(lambda spec: jax.sharding.NamedSharding(mesh, spec), at)
    assert summary._bytes(tree, cut) == 4 * 8 * 3 // 4 + 5
