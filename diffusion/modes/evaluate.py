"""--mode=evaluate: figures of a run or of a pretrained model, by metrics."""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from diffusion.config import drawing, results
from diffusion.evaluation import harness
from diffusion.evaluation.metrics.metric import Drawn
from diffusion.runs import workdir as workdirs


def run(config: ConfigDict, workdir: str) -> None:
    """Judges ``config.evaluation.count`` samples by ``config.evaluation.metrics``.

    The real examples are those of config.data. Leaves ``workdir/evaluations/HASH/evaluation.json``,
    with all settings inside, of which HASH is a hash.
    """
    model = drawing.opened(config, workdir)
    name = "config.evaluation.metrics"
    metrics = harness.make(config.evaluation.metrics, model.pipeline, name)
    if not metrics:
        raise ValueError(
            f"{name} is empty: choose some, such as (\"recognition('digits_svc')\", "
            '"frechet(\'digits_svc\')", "bits(ode())")'
        )
    captions = tuple(dict.fromkeys(model.data.held_out.captions))

    def draw() -> Drawn:
        return model.draw(config.evaluation.count, captions)

    figures = harness.evaluate(metrics, model.pipeline, model.params, model.data, draw)
    settings = results.judged(config, model.pipeline, model.step)
    parent = Path(workdir) / "evaluations"
    with workdirs.results(parent, settings) as folder:
        results.write_evaluation(folder, figures, settings)
    print(f"{results.EVALUATION} in {parent / workdirs.named(settings)}")
