"""Stable Diffusion 1.5 here and in diffusers: time and memory of the U-Net and of text to image.

    python benchmarks/pretrained.py --json=runs/benchmarks/pretrained.json

Both sides read the same folder of random weights in the published architecture, which is written
first, and are given the same noise and text embeddings; their outputs are compared. Every side is a
process of its own, whose peak memory is thereby its own. Float32 with all cores on a CPU; on a GPU
bfloat16, and for diffusers torch.compile and channels_last.

Forward passes alternate between two waiting processes. Pictures are made by one fresh process after
the other, ours and theirs in turn and every one twice: the first, counted from the start of the
process, is the time to first image, the second the time of a picture. The first turn has empty
caches of compiled code, the second those that the first left.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

SIDES = ("ours", "theirs")
UNET = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": 8,
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
SCHEDULER = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
SCALE = 7.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="of a picture")
    parser.add_argument("--latents", type=int, default=64, help="side of the forward pass's input")
    parser.add_argument(
        "--image", type=int, default=0, help="pixels of a picture; by default 512, 256 on a CPU"
    )
    parser.add_argument("--repetitions", type=int, default=0, help="of forwards; by default 20, 5")
    parser.add_argument("--attention", default=None, help="ours, on a GPU: xla or cudnn")
    parser.add_argument("--small", action="store_true", help="small networks, to try this script")
    parser.add_argument("--json", default="", help="where to write the results")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        role, folder = arguments.worker
        if role == "write":
            write(Path(folder), arguments)
        else:
            work(role, folder, arguments)
        return

    # This process, too, asks which devices there are, but takes none of their memory.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    import jax
    import report
    import torch

    gpu = jax.default_backend() == "gpu" and torch.cuda.is_available()
    arguments.image = arguments.image or (512 if gpu else 256)
    arguments.repetitions = arguments.repetitions or (20 if gpu else 5)
    about = report.environment("jax", "jaxlib", "flax", "torch", "diffusers")
    print(f"{about['cpu']}, {about['cores']} cores, load {about['load']:.1f}; {about['devices']}")
    with tempfile.TemporaryDirectory() as folder:
        # In a process of its own, which gives back its gigabytes.
        options = [f"--latents={arguments.latents}", f"--image={arguments.image}"]
        options += ["--small"] if arguments.small else []
        command = [sys.executable, __file__, *options, "--worker", "write", folder]
        subprocess.run(command, check=True)
        rows = forwards(folder, arguments) + pictures(folder, arguments)
    print(report.table(rows, {
        "what": "", "ours": "here", "theirs": "diffusers", "ratio": "diffusers / here",
    }))  # fmt: skip
    if arguments.json:
        settings = {k: v for k, v in vars(arguments).items() if k != "worker"}
        report.save(arguments.json, about | {"arguments": settings}, rows)


def write(folder: Path, arguments: argparse.Namespace) -> None:
    """Networks in diffusers' own random initialisation, and inputs."""
    import diffusers
    import torch

    torch.manual_seed(0)
    unet, vae = dict(UNET), dict(VAE)
    if arguments.small:
        unet["block_out_channels"], vae["block_out_channels"] = (32, 32, 64, 64), (32,) * 4
    diffusers.UNet2DConditionModel(**unet).save_pretrained(folder / "unet")
    diffusers.AutoencoderKL(**vae).save_pretrained(folder / "vae")
    diffusers.DPMSolverMultistepScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    rng, size = np.random.default_rng(0), arguments.image // 8
    np.savez(
        folder / "inputs.npz",
        x=rng.normal(size=(1, arguments.latents, arguments.latents, 4)).astype(np.float32),
        noise=rng.normal(size=(1, size, size, 4)).astype(np.float32),
        cond=rng.normal(size=(1, 77, 768)).astype(np.float32),
        null=rng.normal(size=(1, 77, 768)).astype(np.float32),
    )


class Worker:
    """A side's process, which answers one command at a time."""

    def __init__(self, side: str, folder: str, arguments: argparse.Namespace, cache: str = ""):
        command = [sys.executable, __file__, f"--steps={arguments.steps}", "--worker", side, folder]
        if arguments.attention:
            command.append(f"--attention={arguments.attention}")
        environment = dict(os.environ)
        environment.pop("XLA_PYTHON_CLIENT_PREALLOCATE", None)
        environment["TRANSFORMERS_VERBOSITY"] = "error"
        environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.5"  # there are two of us
        if cache:
            environment["JAX_COMPILATION_CACHE_DIR"] = f"{cache}/jax"
            environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
            environment["TORCHINDUCTOR_CACHE_DIR"] = f"{cache}/torch"
        self.began = time.perf_counter()
        self.process = subprocess.Popen(
            command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def ask(self, command: str) -> dict[str, float]:
        """What it answers."""
        print(command, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"a process ended at {command!r}; its error is above")
        return json.loads(answer)

    def close(self) -> None:
        """Waits for its end."""
        self.process.stdin.close()
        self.process.wait()


def forwards(folder: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows about one forward pass."""
    workers = {side: Worker(side, folder, arguments) for side in SIDES}
    seconds = {side: [] for side in SIDES}
    for repetition in range(arguments.repetitions + 1):
        for side, worker in workers.items():
            found = worker.ask("forward")["seconds"]
            print(f"forward, {side}: {found:.3g} s", flush=True)
            if repetition:  # the first compiles and warms up
                seconds[side].append(found)
    peaks = {side: worker.ask("peak")["gib"] for side, worker in workers.items()}
    for worker in workers.values():
        worker.close()
    what = f"forward, {arguments.latents} × {arguments.latents} latents"
    return [
        row(f"{what} [s]", {side: float(np.median(s)) for side, s in seconds.items()})
        | {"all": seconds, "difference": difference(folder, "forward")},
        row(f"{what}, peak memory [GiB]", peaks),
    ]


def pictures(folder: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows about text to image."""
    first = {"empty": {}, "filled": {}}
    seconds, peaks = {side: [] for side in SIDES}, {}
    for cache, times in first.items():
        for side in SIDES:
            worker = Worker(side, folder, arguments, f"{folder}/cache")
            worker.ask("image")
            times[side] = time.perf_counter() - worker.began
            seconds[side].append(worker.ask("image")["seconds"])
            peaks[side] = worker.ask("peak")["gib"]
            worker.close()
            print(
                f"{cache} caches, {side}: first image after {times[side]:.3g} s, "
                f"the next in {seconds[side][-1]:.3g} s",
                flush=True,
            )
    side = arguments.image
    what = f"text to image, {side} × {side}, {arguments.steps} guided steps"
    return [
        row(f"{what} [s]", {side: float(np.median(s)) for side, s in seconds.items()})
        | {"all": seconds, "difference": difference(folder, "image")},
        row(f"{what}, peak memory [GiB]", peaks),
        *(row(f"{what}, first image, {cache} caches [s]", times) for cache, times in first.items()),
    ]


def row(what: str, values: dict[str, float]) -> dict[str, Any]:
    """A row of the table."""
    return {"what": what, **values, "ratio": values["theirs"] / values["ours"]}


def difference(folder: str, what: str) -> dict[str, float]:
    """Between the sides' outputs: largest, and their standard deviation."""
    ours, theirs = (np.load(f"{folder}/{what}_{side}.npy") for side in SIDES)
    found = {"largest": float(np.abs(ours - theirs).max()), "std": float(theirs.std())}
    print(f"{what}: outputs differ by {found['largest']:.1e}, their std is {found['std']:.2g}")
    return found


def work(side: str, folder: str, arguments: argparse.Namespace) -> None:
    """What a side's process does: it answers commands until there are no more."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # libraries print, too
    make = {"ours": our_side, "theirs": their_side}[side]
    inputs = dict(np.load(f"{folder}/inputs.npz"))
    commands, peak = make(Path(folder), inputs, arguments)
    for line in sys.stdin:
        command = line.strip()
        if command == "peak":
            answer = {"gib": peak() / 2**30}
        else:
            began = time.perf_counter()
            output = commands[command]()
            answer = {"seconds": time.perf_counter() - began}
            np.save(f"{folder}/{command}_{side}.npy", output)
        print(json.dumps(answer), file=answers, flush=True)


Commands = dict[str, Callable[[], np.ndarray]]


def host_peak() -> int:
    """Bytes of this process's memory, at most.

    Not ``getrusage``'s: a new process has its parent's there.
    """
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(line for line in status if line.startswith("VmHWM"))
    return 1024 * int(peak.split()[1])


def our_side(
    folder: Path, inputs: dict[str, np.ndarray], arguments: argparse.Namespace
) -> tuple[Commands, Callable[[], int]]:
    """Commands, and the peak memory."""
    import jax
    import jax.numpy as jnp

    from diffusion import pretrained
    from diffusion.conditioning import Conditioning
    from diffusion.pipelines import latents
    from diffusion.pretrained.folders import read_json
    from diffusion.pretrained.schedulers import from_diffusers
    from diffusion.sampling.sample import image_keys

    gpu = jax.default_backend() == "gpu"
    dtype = jnp.bfloat16 if gpu else jnp.float32

    network, params, _ = pretrained.load(folder, "unet", dtype=dtype)
    network = network.clone(dtype=dtype, attention_implementation=arguments.attention)
    cond, null = (
        Conditioning(context=jnp.asarray(inputs[name], dtype)) for name in ("cond", "null")
    )
    apply = jax.jit(lambda params, x, cond: network.apply({"params": params}, x, time_one, cond))
    time_one = jnp.full(1, 500.0)

    def forward() -> np.ndarray:
        return np.asarray(apply(params, jnp.asarray(inputs["x"]), cond))

    others = {}

    def image() -> np.ndarray:
        if not others:  # the autoencoder is loaded where it is needed
            vae, others["params"], _ = pretrained.load(folder, "vae", dtype=dtype)
            vae = vae.clone(dtype=dtype)

            @jax.jit
            def decode(params: Any, z: jax.Array) -> jax.Array:
                images = vae.apply({"params": params}, vae.from_latents(z), method="decode")
                return jnp.clip(images.astype(jnp.float32) / 2 + 0.5, 0, 1)

            others["decode"] = decode
        config = read_json(folder / "scheduler" / "scheduler_config.json")
        sampler = from_diffusers(config, steps=arguments.steps)
        noise = jnp.asarray(inputs["noise"])
        z = latents.draw(
            network, params, sampler, image_keys(0, np.arange(1)), noise.shape[1:], cond,
            latents.Steering(null=null, scale=SCALE), x_init=noise * sampler.solver.init,
        )  # fmt: skip
        return np.asarray(others["decode"](others["params"], z))

    def peak() -> int:
        return jax.devices()[0].memory_stats()["peak_bytes_in_use"] if gpu else host_peak()

    return {"forward": forward, "image": image}, peak


def their_side(
    folder: Path, inputs: dict[str, np.ndarray], arguments: argparse.Namespace
) -> tuple[Commands, Callable[[], int]]:
    """The same of diffusers."""
    import diffusers
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_grad_enabled(False)
    gpu = torch.cuda.is_available()
    dtype, device = (torch.bfloat16, "cuda") if gpu else (torch.float32, "cpu")

    def load(cls: type, name: str) -> torch.nn.Module:
        net = cls.from_pretrained(folder / name, torch_dtype=dtype).to(device)
        return net.to(memory_format=torch.channels_last) if gpu else net

    def tensor(name: str) -> torch.Tensor:
        array = torch.tensor(inputs[name], dtype=dtype, device=device)
        return array.permute(0, 3, 1, 2) if array.ndim == 4 else array

    network = load(diffusers.UNet2DConditionModel, "unet")
    if gpu:
        network = torch.compile(network, mode="reduce-overhead", fullgraph=True)

    def forward() -> np.ndarray:
        time_one = torch.full((1,), 500.0, device=device)
        out = network(tensor("x"), time_one, tensor("cond"), return_dict=False)[0]
        return out.float().permute(0, 2, 3, 1).cpu().numpy()

    pipelines = []

    def image() -> np.ndarray:
        if not pipelines:
            pipelines.append(
                diffusers.StableDiffusionPipeline(
                    vae=load(diffusers.AutoencoderKL, "vae"),
                    unet=network,
                    scheduler=diffusers.DPMSolverMultistepScheduler.from_pretrained(
                        folder / "scheduler"
                    ),
                    **dict.fromkeys(
                        ("text_encoder", "tokenizer", "safety_checker", "feature_extractor")
                    ),
                    requires_safety_checker=False,
                )
            )
            pipelines[0].set_progress_bar_config(disable=True)
        size = 8 * inputs["noise"].shape[1]
        return pipelines[0](
            prompt_embeds=tensor("cond"),
            negative_prompt_embeds=tensor("null"),
            latents=tensor("noise"),
            num_inference_steps=arguments.steps,
            guidance_scale=SCALE,
            height=size,
            width=size,
            output_type="np",
        ).images

    return {"forward": forward, "image": image}, (
        torch.cuda.max_memory_allocated if gpu else host_peak
    )


if __name__ == "__main__":
    main()
