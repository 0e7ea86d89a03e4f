"""The scripts' small mode runs, and what it writes has the fields that the tables are made of."""

import argparse
import json
import sys
from pathlib import Path
from typing import ClassVar

import jax
import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import attention
import convolutions
import gpu
import networks
import report
import worker
import workloads


class InThisProcess:
    """A worker without a process of its own: tests share what is imported."""

    output = worker.Worker.output
    answers: ClassVar = {
        "matmul": 1e-3,
        "bare": 1e-3,
        "step:compile": 2e-3,
        "forward:compile": 5e-4,
    }

    def __init__(self, side, request):
        self.answer, self.folder = worker.server(side, request), argparse.Namespace(name=".")

    def ask(self, do, command="", **arguments):
        if command in self.answers:
            return self.answers[command]
        return self.answer(json.loads(json.dumps({"do": do, "command": command, **arguments})))


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    monkeypatch.setattr(worker, "Worker", InThisProcess)
    monkeypatch.setattr(worker, "close_all", lambda workers: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "has_gpu", lambda: False)
    torch.set_num_threads(1)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    arguments = ["--small", "--only=tiny U-Net", "--repetitions=2", "--seconds=0", "--json=n.json"]
    return ["networks.py", *arguments]


@pytest.mark.parametrize("what", ["forward", pytest.param("train", marks=pytest.mark.large)])
def test_networks_are_measured_on_both_sides_and_agree(tiny, what, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [*tiny, f"--does={what}"])
    networks.main()
    found = json.loads(Path("n.json").read_text())
    about, (row,) = found["environment"], found["rows"]
    assert {"cpu", "cores", "devices", "versions", "commit", "command"} <= about.keys()
    assert row["difference"] < 1e-4  # outputs; or loss and gradient's norm
    assert row["ours"] > 0 and row["eager"] > 0 and len(row["runs"]["ours"]["all"]) == 2
    best = min(row[name] for name in ("eager", "compile", "channels_last") if name in row)
    assert row["ratio"] == pytest.approx(best / row["ours"])
    rate = max(row["peak_tflops"].values()) * 1e3  # GFLOP/s
    assert row["utilisation"] == pytest.approx(100 * row["gflop"] / row["ours"] * 1e3 / rate)
    # One resolution of 8 x 8 with 16 channels: seven 3 x 3 convolutions of that width and more.
    passes = 3 if what == "train" else 1
    assert row["gflop"] > passes * 4 * 7 * 2 * 64 * 9 * 16 * 16 / 1e9
    assert "best PyTorch / here" in capsys.readouterr().out


def test_weights_are_the_same_everywhere_and_neither_tiny_nor_huge():
    network = workloads.TINY
    one, other = workloads.weights(network), workloads.weights(network)
    jax.tree.map(np.testing.assert_array_equal, one, other)
    kernel = one["conv_in"]["kernel"]
    assert np.std(kernel) == pytest.approx((9 * 1) ** -0.5, rel=0.2)
    assert one["conv_norm_out"]["scale"].mean() == pytest.approx(1, abs=0.1)


def test_the_gpus_cases_are_the_published_networks():
    found = {(c.name, c.batch): c for c in workloads.networks(gpu=True, small=False)}
    assert [b for name, b in found if "SDXL" in name] == [1, 4, 16]
    network = found["DDPM's U-Net, CIFAR-10", 256].network
    shapes = workloads.models.shapes(network)
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 35_746_307


def test_a_part_that_ends_early_loses_nothing(tmp_path, monkeypatch):
    """Its time is over after the first row."""
    script = tmp_path / "part.py"
    script.write_text(
        "import json, sys, time\n"
        "path = sys.argv[-1].removeprefix('--json=')\n"
        "found = {'environment': {'notes': ['half']}, 'rows': [{'case': 'a', 'ours': 1.5}]}\n"
        "open(path, 'w').write(json.dumps(found))\n"
        "print('one row', flush=True)\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    monkeypatch.setattr(gpu, "PARTS", {"one": (1, "part.py"), "two": (1, "part.py")})
    options = argparse.Namespace(minutes=0.26, small=False, turns="", parts="")
    gpu.Run(tmp_path / "out", ["one", "two"], options).go()
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["parts"]["one"]["rows"] == [{"case": "a", "ours": 1.5}]
    assert found["parts"]["one"]["status"] == "ended after 1 s"
    assert found["parts"]["two"]["status"] == "not run: the time was over"
    assert "| a | 1.5 |" in (tmp_path / "out" / "report.md").read_text()
    assert "one row" in (tmp_path / "out" / "log.txt").read_text()


@pytest.mark.parametrize("part", [attention, convolutions])
def test_forms_of_one_operation_agree(part, tiny, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script", "--small", "--repetitions=1", "--json=p.json"])
    part.main()
    for row in json.loads(Path("p.json").read_text())["rows"]:
        assert max(value for key, value in row.items() if key.endswith("error")) < 1e-4
        assert "failed" not in row and any(isinstance(value, float) for value in row.values())
