"""What changes from picture to picture is data of one compiled program."""

import jax
import numpy as np
import pytest
import tiny_pipelines as tiny
from tiny_runs import digits

from diffusion.config.experiment import build
from diffusion.pipelines import guidance, load, samplers
from diffusion.pipelines.drawer import Drawer

STEPS = 4
compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
)


def drawn(pipeline, params, subjects, *, negative=None, seed=0, solver="auto", steps=STEPS, **how):
    """(samples, how many programs were compiled to draw them)."""
    sampler = samplers.make(pipeline, solver, steps=steps)
    made = guidance.make(pipeline, sampler, negative=negative, **how)
    drawer = Drawer(
        made.pipeline,
        sampler,
        made.chain,
        acceleration=made.acceleration,
        batch_size=len(subjects),
        seed=seed,
    )
    compiled.clear()
    return drawer.draw(params, subjects, negative), len(compiled)


def assert_compiled_once(pipeline, params, first, others):
    """``first`` compiles; ``others``, which differ from it, do not, and give other samples."""
    usual, programs = drawn(pipeline, params, **first)
    assert programs
    for changes in others:
        x, programs = drawn(pipeline, params, **first | changes)
        assert not programs, f"{changes} compiles again"
        assert np.abs(x - usual).max() > 1e-4, f"{changes} changes nothing"


CHAIN = ("cfg(2)", "interval(0.1, 50)", "clip()")


def test_of_a_run():
    experiment = build(digits())
    example = {"x": np.zeros((4, 8, 8, 1), np.float32), "label": np.zeros(4, np.int32)}
    shapes = jax.eval_shape(experiment.objective.init, jax.random.key(0), example)
    rng = np.random.default_rng(0)
    trained = jax.tree.map(lambda a: rng.normal(0, 0.1, a.shape).astype(np.float32), shapes)
    first = {"subjects": [0, 1, 2, 3], "guidance": CHAIN, "accelerations": "cache(every(2))"}
    others = [{"solver": name} for name in ("ddim", "ddpm", "dpmpp_3m", "dpmpp_2m_sde", "lms")]
    others += [{"solver": "midpoint", "steps": STEPS // 2}, {"seed": 1}, {"subjects": [3, 2, 1, 0]}]
    others += [{"guidance": ("cfg(5.5)", *CHAIN[1:])}, {"accelerations": "cache(every(3))"}]
    others += [{"guidance": ("cfg(2)", "interval(0.5, 2)", "clip()")}, {"negative": 9}]
    params = experiment.params(trained)
    assert_compiled_once(experiment.pipeline, params, first, others)


@pytest.mark.filterwarnings("ignore")
def test_of_a_pretrained_pipeline(tmp_path):
    tiny.whole(folder=tmp_path)
    first = {"subjects": 4 * ["a photo of a cat"], "guidance": CHAIN[:2], "negative": "ugly"}
    first["accelerations"] = "cache(every(2))"
    others = [{"solver": f"{name}Scheduler"} for name in ("EulerDiscrete", "DPMSolverMultistep")]
    others += [{"solver": "dpmpp_2m"}, {"seed": 1}, {"negative": "blurry, on a river"}]
    others += [{"subjects": ["a dog", "the red house", "a cat", "night"]}]
    others += [{"guidance": ("cfg(4)", CHAIN[1])}, {"accelerations": "cache(every(3))"}]
    others += [{"guidance": ("cfg(2)", "interval(0.5, 2)")}]
    assert_compiled_once(*load(tmp_path), first, others)
