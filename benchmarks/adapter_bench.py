"""What the demonstrations of adapters share: a base, data, runs that main.py trains, judges."""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from benchmarks import adapter_judges as judges
from diffusion import pipelines
from diffusion.evaluation.figures import to_uint8
from diffusion.pipelines import guidance, samplers, tasks
from diffusion.pipelines.draw import Inputs
from diffusion.pipelines.drawer import Drawer
from diffusion.pipelines.pipeline import Params, Pipeline

ROOT = Path(__file__).parents[1]
STEPS, BATCH = 12, 49  # of the sampler, and pictures at a time: 196 are four batches
SHOWN = 6  # pictures of each demonstration
Found = tuple[dict[str, float], list[tuple[str, np.ndarray]]]
"""Figures by name, and pictures [SHOWN, H, W, 3] with their labels."""


@dataclass
class Bench:
    """What the demonstrations share.

    Attributes:
      base: workdir of the text-to-image run.
      data: folder of the pictures that it was trained on.
      folder: where data, runs and results go.
      quick: tries the script: a few steps and pictures.
      seconds: that training took, by run.
    """

    base: str
    data: str
    folder: Path
    quick: bool = False
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.train, self.held_out = judges.items(self.data)
        self.opened = pipelines.open_any(self.base)
        self.pipeline, self.params = self.opened.pipeline, self.opened.load()
        if self.quick:
            self.held_out = self.held_out.chosen(range(1, 190, 21))

    def hash(self) -> str:
        """Of the base's parameters."""
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves(pipelines.open_any(self.base).load()):
            digest.update(np.ascontiguousarray(leaf).tobytes())
        return digest.hexdigest()

    def count(self, wanted: int) -> int:
        """Pictures that are judged."""
        return min(wanted, len(self.held_out.captions))

    def file(self, name: str, **arrays: np.ndarray) -> str:
        """An ``.npz`` of data, written once."""
        path = self.folder / "data" / f"{name}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            np.savez(path, **arrays)
        return str(path)

    def pictures(self, name: str, images: np.ndarray) -> str:
        """A folder of PNGs."""
        path = self.folder / "data" / name
        path.mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(images):
            Image.fromarray(image).save(path / f"{i}.png")
        return str(path)

    def trained(self, config: str, name: str, seed: int, steps: int, batch: int, **own: Any) -> str:
        """The workdir of a run that main.py trains; ``own`` are further fields, "a.b" as a__b."""
        workdir = self.folder / "runs" / f"{name}_{seed}"
        fields = {
            "model.path": self.base,
            "seed": seed,
            "data.size": judges.SIDE,
            "train.steps": 2 if self.quick else steps,
            "train.batch_size": batch,
            "train.checkpoint_every": 100_000,
            "train.sample_every": 0,
            "optimizer.warmup": 20,
            "sampler.steps": STEPS,
            "samples.columns": 2,
            **{key.replace("__", "."): value for key, value in own.items()},
        }
        command = [sys.executable, "main.py", f"--config=configs/{config}.py"]
        command += [f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in fields.items())]
        log, began = self.folder / "logs" / f"{name}_{seed}.log", time.perf_counter()
        log.parent.mkdir(exist_ok=True)
        if (workdir / "done").exists():
            return str(workdir)
        print(" ".join(command), flush=True)
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        with log.open("w") as out:
            done = subprocess.run(command, cwd=ROOT, stdout=out, stderr=out, env=environment)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{log.read_text()[-3000:]}")
        self.seconds[name] = round(time.perf_counter() - began)
        return str(workdir)

    def autoencoded(self, images: np.ndarray) -> np.ndarray:
        """What the base's autoencoder makes of pictures."""
        parts, codec = [], self.pipeline.codec
        for i in range(0, len(images), 200):
            part = images[np.minimum(np.arange(i, i + 200), len(images) - 1)]
            z = codec.encode(self.params, part.astype(np.float32) / 127.5 - 1)
            parts.append(codec.decode_all(self.params, np.asarray(z))[: len(images) - i])
        return to_uint8(np.concatenate(parts))

    @functools.cached_property
    def judge(self) -> Any:
        """The network that knows pictures again."""
        train = self.train.images

        def kinds() -> Sequence[np.ndarray]:
            return train, self.autoencoded(train)

        return judges.encoders(self.folder, kinds, 2 if self.quick else 300)

    @functools.cached_property
    def recognition(self) -> judges.Recognition:
        """Of the held-out pictures."""
        return judges.Recognition(self.judge, self.held_out.images)

    @functools.cached_property
    def style(self) -> judges.StyleJudge:
        """Trained on training pictures that no LoRA has seen in the style."""
        plain = self.train.images[1::4]
        made = judges.styled(plain)
        both = ([x, self.autoencoded(x)] for x in (plain, made))
        return judges.StyleJudge(*both)

    def drawn(
        self,
        pipeline: Pipeline,
        params: Params,
        subjects: Sequence[str],
        *,
        given: Mapping[str, np.ndarray] | None = None,
        scales: Mapping[str, float] | None = None,
        chain: Any = "auto",
        seed: int = 0,
    ) -> np.ndarray:
        """Pictures uint8 [N, H, W, 3] of captions.

        Args:
          given: rows for each of "hint" [N, H, W, 3], "image_features" [N, D] or, for an editor,
            "image" [N, h, w, C].
          scales: of "hint" and "image_features"; 1 where there is none.
          chain: of guidance; by default the pipeline's.
          seed: of the noise.
        """
        sampler = samplers.make(pipeline, steps=STEPS)
        made = guidance.make(pipeline, sampler, chain)
        rows, scales = dict(given or {}), dict(scales or {})

        def prepare(index: np.ndarray, keys: jax.Array, cond: Any, null: Any) -> Inputs:
            own = {name: value[index] for name, value in rows.items()}
            if pipeline.edits:
                return tasks.edited(pipeline, params, cond, null, own["image"], encoded=True)

            def scaled(signals: Sequence[Any], name: str) -> tuple[Any, ...]:
                scale = np.full((len(index), 1), scales.get(name, 1.0), np.float32)
                return tuple(signal.replace(scale=scale) for signal in signals)

            both = (
                c.replace(
                    hints=scaled(c.hints, "hint"),
                    image_prompts=scaled(c.image_prompts, "image_features"),
                )
                for c in tasks.followed(cond, null, own)
            )
            return tasks.new(pipeline, *both)

        drawer = Drawer(made.pipeline, sampler, made.chain, batch_size=BATCH, seed=seed)
        x = drawer.draw(params, list(subjects), prepare=prepare)
        return to_uint8(pipeline.codec.decode_all(params, x))

    def drawn_base(self, subjects: Sequence[str], seed: int) -> np.ndarray:
        """Pictures by the base alone."""
        return self.drawn(self.pipeline, self.params, subjects, seed=seed)
