"""Points in one, two or four steps: every method of few steps, by its name after a colon.

    python main.py --config=configs/toy2d.py --workdir=runs/toy2d
    python main.py --config=configs/few_steps2d.py:mean_flow --workdir=runs/mean_flow2d \
        --config.few_steps.teacher=runs/toy2d

The student begins with the teacher's parameters. ``--config.few_steps.teacher=
--config.train.init_from=`` trains without one, by the methods that can.
"""

from ml_collections import ConfigDict, FieldReference

from configs import toy2d

METHODS = {
    "ect": "consistency(ect(every=375), target='params')",
    "consistency": "consistency(nodes(18))",
    "karras": "consistency(karras(80, first=10, steps=3000, std=2.0), target='params')",
    "segments": "consistency(segments(4, nodes=32))",
    "trajectories": "consistency(trajectories(18))",
    "continuous": "continuous()",
    "mean_flow": "mean_flow()",
    "shortcut": "shortcut(finest=32)",
    "progressive": "progressive(steps=4)",
    "reflow": "reflow(count=100_000)",
    "one_step": "reflow(count=100_000, one_step=True)",
    "distribution_matching": "distribution_matching(steps=4, every=5)",
    "score_identity": "score_identity(every=5)",
    "adversarial": "adversarial(features=teacher)",
    "latent_adversarial": "latent_adversarial(switch=750)",
    "flash": "flash(stage=750, solver_steps=16)",
    "drifting": "drifting(tau=0.05)",
}
NORMS = ("ect", "karras")  # whose distance is a norm, not its square
GENERATORS = ("distribution_matching", "score_identity", "adversarial", "latent_adversarial")
RESTARTING = ("ect", "consistency", "karras", "continuous", "flash", *GENERATORS)
CRITICS = ("adversarial", "latent_adversarial", "flash")
WITHOUT_TEACHER = ("shortcut", "drifting")


def get_config(method: str = "ect") -> ConfigDict:
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}")
    c = toy2d.get_config()
    teacher = FieldReference("runs/toy2d", field_type=str)
    c.objective.name = "few_steps"
    c.few_steps.method = METHODS[method]
    if method not in WITHOUT_TEACHER:
        c.few_steps.teacher = teacher
    c.train.init_from = teacher

    c.optimizer.learning_rate = 5e-4
    c.ema = "constant(decay=0.99)"

    restarts = method in RESTARTING  # from new noise, as a consistency function does
    c.sampler.solver = "consistency(sigma_min=0.0)" if restarts else "euler"
    c.sampler.steps = 1
    if method in NORMS:
        c.objective.distance = "pseudo_huber(c=1e-4)"
    if method in CRITICS:
        c.optimizer.rates = (("head/", 4.0),)
    if method == "drifting":
        c.train.batch_size = 2048
    return c
