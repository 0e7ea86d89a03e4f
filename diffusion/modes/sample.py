"""--mode=sample: samples of a run or of a pretrained model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from diffusion.config import drawing
from diffusion.pipelines import gallery
from diffusion.runs import workdir as workdirs


def run(config: ConfigDict, workdir: str) -> None:
    """Draws ``config.samples.count`` samples.

    Leaves in ``workdir/samples/HASH``, of whose settings.json HASH is a hash: samples.npz with x
    [N, ...] as the network has it and, where there are such, label or caption [N] and of latents
    image [N, H, W, 3]; grid.png; of images pictures/, one PNG each with its settings in the
    metadata; with samples.gif trajectory.png and trajectory.gif. With sampler.preview_every,
    previews/<batch>_<evaluation>.png appear meanwhile in ``workdir/samples/HASH.partial``.
    """
    columns = config.samples.columns

    def preview(batch: int, evaluation: int, x0: np.ndarray) -> None:
        if not np.isfinite(x0).all():
            return  # the samples will say so
        shown = pipeline.codec.decode_all(params, x0[: columns**2])
        (folder / "previews").mkdir(exist_ok=True)
        path = folder / "previews" / f"{batch:03d}_{evaluation:04d}.png"
        pipeline.view.grid(path, shown, columns=columns)

    model = drawing.opened(config, workdir, preview)
    pipeline, params = model.pipeline, model.params
    count, kind = config.samples.count or 100, pipeline.conditioner.subject
    settings = drawing.settings(config, pipeline, model.step)
    settings["samples"] |= {"count": count, "columns": columns, "gif": config.samples.gif}
    parent = Path(workdir) / "samples"
    with workdirs.results(parent, settings) as folder:
        subjects = model.subjects(count)
        x = model.drawer.draw(params, subjects, model.negative)
        shown, kind = pipeline.codec.decode_all(params, x), "caption" if kind == "text" else kind
        arrays = {"x": x} | ({} if shown is x else {"image": shown})
        if kind:
            arrays[kind] = np.array(subjects)
        np.savez(folder / "samples.npz", **arrays)
        gallery.save_grid(folder / "grid.png", pipeline, shown, subjects, columns)
        shared = {
            name: ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            for name, value in settings["sampler"].items()
        }
        shared |= {"negative": str(config.samples.negative), "step": str(model.step)}
        texts = [shared | {"index": str(i)} for i in range(len(x))]
        if kind:
            texts = [text | {kind: str(subject)} for text, subject in zip(texts, subjects)]
        pipeline.view.save(folder / "pictures", shown, texts)
        if config.samples.gif:
            some = subjects[: columns**2]
            gallery.save_trajectory(folder, model.drawer, params, some, model.negative, columns)
    print(f"{len(x)} samples in {parent / workdirs.named(settings)}")
