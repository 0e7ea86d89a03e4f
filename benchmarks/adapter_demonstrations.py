"""What adapters learn on a small text-to-image model, judged with controls.

    python -m benchmarks.adapter_demonstrations --base=runs/emoji --data=DATA --workdir=DIR

``--base`` is a run of configs/emoji_text_to_image.py, DATA its data. Each of seven demonstrations
trains adapters by the commands that a user types, and judges what is drawn with them by networks
and measures of adapter_judges.py. Results are kept in DIR/results.json by demonstration and seed;
what is there is not made again, so that a stopped command goes on. DIR/results.md has the table,
DIR/adapters.png the pictures. The base's parameters have to be the same to the bit at the end.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import jax

from benchmarks import adapter_networks as networks
from benchmarks import adapter_tables as tables
from benchmarks import adapter_weights as weights
from benchmarks.adapter_bench import Bench, Found
from diffusion import compiler

ALL: dict[str, Callable[[Bench, int], Found]] = {
    "lora": weights.lora,
    "dreambooth": weights.dreambooth,
    "textual_inversion": weights.textual_inversion,
    "controlnet": networks.controlnet,
    "ip_adapter": networks.ip_adapter,
    "instruct_pix2pix": networks.instruct_pix2pix,
    "stacked": networks.stacked,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", required=True, help="run of configs/emoji_text_to_image.py")
    parser.add_argument("--data", required=True, help="folder of its pictures")
    parser.add_argument("--workdir", required=True, type=Path, help="where runs and results go")
    parser.add_argument("--only", default=",".join(ALL), help="demonstrations, with commas")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a few steps, to try the script")
    given = parser.parse_args()
    print(compiler.tune())
    cache = Path("~/.cache/diffusion-jax").expanduser()
    jax.config.update("jax_compilation_cache_dir", str(cache))
    given.workdir.mkdir(parents=True, exist_ok=True)
    folder = given.workdir.resolve()
    bench = Bench(str(Path(given.base).resolve()), given.data, folder, given.quick)
    results, before = tables.Results(folder), bench.hash()
    for seed in range(given.seeds):
        for name in given.only.split(","):
            if results.has(name, seed):
                continue
            bench.seconds.clear()
            began = time.perf_counter()
            try:
                figures, shown = ALL[name](bench, seed)
            except Exception:
                traceback.print_exc()  # the others go on; the same command tries this one again
                continue
            figures["seconds"] = round(time.perf_counter() - began)
            figures |= {f"seconds_{run}": value for run, value in bench.seconds.items()}
            results.add(name, seed, figures, shown)
            print(name, seed, json.dumps(figures), flush=True)
            assert bench.hash() == before, "the base's parameters have changed"
    print(f"the base's parameters are as they were: {before[:16]}")


if __name__ == "__main__":
    main()
