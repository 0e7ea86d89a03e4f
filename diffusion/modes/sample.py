"""--mode=sample: samples of a run or of a pretrained model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from diffusion.config import drawing
from diffusion.pipelines import gallery


def run(config: ConfigDict, workdir: str) -> None:
    """Draws ``config.samples.count`` samples.

    Leaves in ``workdir/samples``: grid.png, of images one PNG each with its settings in the
    metadata, and samples.npz with x [N, ...] as the network has it and, where there are such, label
    or caption [N] and of latents image [N, H, W, 3]; with samples.gif trajectory.png and
    trajectory.gif. With sampler.preview_every, preview_<batch>_<evaluation>.png appear meanwhile.
    """
    folder, columns = Path(workdir) / "samples", config.samples.columns

    def preview(batch: int, evaluation: int, x0: np.ndarray) -> None:
        shown = pipeline.codec.decode_all(params, x0[: columns**2])
        path = folder / f"preview_{batch:03d}_{evaluation:04d}.png"
        pipeline.view.grid(path, shown, columns=columns)

    model = drawing.opened(config, workdir, preview)
    pipeline, params = model.pipeline, model.params
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("preview_*.png"):
        old.unlink()
    subjects = model.subjects(config.samples.count or 100)
    x = model.drawer.draw(params, subjects, model.negative)
    shown, kind = pipeline.codec.decode_all(params, x), pipeline.conditioner.subject
    kind = "caption" if kind == "text" else kind
    arrays = {"x": x} | ({} if shown is x else {"image": shown})
    if kind:
        arrays[kind] = np.array(subjects)
    np.savez(folder / "samples.npz", **arrays)
    gallery.save_grid(folder / "grid.png", pipeline, shown, subjects, columns)
    settings = {name: str(value) for name, value in config.sampler.to_dict().items()}
    settings["negative"] = str(config.samples.negative)
    texts = [settings | {"index": str(i)} for i in range(len(x))]
    if kind:
        texts = [text | {kind: str(subject)} for text, subject in zip(texts, subjects)]
    pipeline.view.save(folder, shown, texts)
    if config.samples.gif:
        some = subjects[: columns**2]
        gallery.save_trajectory(folder, model.drawer, params, some, model.negative, columns)
    print(f"{len(x)} samples in {folder}")
