"""--mode=evaluate: figures of a run, of a pretrained model or of samples in a file, by metrics."""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from diffusion.config import contents, drawing, judging, ranges, results
from diffusion.errors import field
from diffusion.evaluation import sample_files
from diffusion.evaluation.shards import SAMPLES, Shards
from diffusion.runs import workdir as workdirs


def run(config: ConfigDict, workdir: str | None) -> None:
    """Judges ``config.evaluation.count`` samples by ``config.evaluation.metrics``.

    The samples are drawn, or those of the file or folder ``config.evaluation.samples``. Leaves
    ``workdir/evaluations/HASH/evaluation.json``, with all settings inside, of which HASH is a hash,
    and the pictures of metrics that have any. Features of samples stay in
    ``workdir/shards`` until the figures are there: a stopped command goes on.
    """
    ranges.check(config)
    judging.check(config)
    c, parent, params = config.evaluation, Path(workdir or ".") / "evaluations", None
    of_model, of_subjects = "", []
    if c.samples:
        with field(f"config.evaluation.samples={c.samples!r}"):
            samples = sample_files.read(c.samples, c.count)
        made = judging.make(config, None, lambda: judging.data(config))
        settings = {"samples": {"path": c.samples, "checksum": samples.checksum}}
    else:
        model = drawing.opened(config, workdir)
        made = judging.make(config, model.pipeline, lambda: model.data)
        settings = drawing.settings(config, model.pipeline, model.step)
        samples, params = model.samples(c.count) if made.needs else None, model.params
        of_model = judging.fingerprint(params)  # a run may have been trained anew meanwhile
        if made.needs:  # captions may have changed too
            of_subjects = contents.in_turn(config, model.drawer, model.captions)
    if not made.metrics:
        raise ValueError(
            f'{judging.METRICS} is empty: choose some, such as ("recognition(digits_svc)", '
            '"frechet(pixels)", "bits(ode())")'
        )
    drawn = settings | {"parameters": of_model, "subjects": of_subjects, "shard": c.shard}

    def place(rounded: bool) -> Path:
        """Of shards; samples that are kept are rounded, and their features differ a little."""
        return Path(workdir or ".") / "shards" / workdirs.named(drawn | {"rounded": rounded})

    keep = SAMPLES if place(True).exists() else c.keep
    shards = Shards(c.shard, place(keep == SAMPLES))
    settings = results.judged(config, settings, made)
    with shards.used(bool(keep)):
        if not made.collect(samples, params, shards, keep=keep, part=tuple(c.part)):
            print(f"part {c.part} is done; the same command makes the others, or waits for them")
            return
        with workdirs.results(parent, settings) as folder:
            figures = made.figures(samples, params, shards, folder)
            results.write_evaluation(folder, figures, settings)
    shards.remove()
    print(f"{results.EVALUATION} in {parent / workdirs.named(settings)}")
