"""Commands and configs that cannot be: refused in a plain sentence before anything is written."""

import pytest
from commands import assert_names, command

NOTHING = "nowhere/at/all"

CASES = [  # overrides, and what the first sentence has to name
    ("train.stepz=3", "config.train.stepz", "config.train.steps?"),
    ("foo=3", "config.foo", "train"),
    ("train.steps.more=3", "config.train.steps"),
    ("train=3", "config.train"),
    ("train.steps=many", "config.train.steps=many"),
    ("train.steps=", "config.train.steps"),
    ("train.steps=1.5", "config.train.steps=1.5"),
    ("train.steps=-1", "config.train.steps", "-1"),
    ("train.steps=0", "config.train.steps", "0"),
    ("train.batch_size=0", "config.train.batch_size", "positive"),
    ("train.batch_size=63", "config.train.batch_size=63", "60 or 64"),
    ("train.accumulate=-2", "config.train.accumulate", "-2"),
    ("train.log_every=0", "config.train.log_every"),
    ("train.keep=0", "config.train.keep", "positive"),
    ("train.init_what=(", "config.train.init_what='('", "regular expression"),
    ("train.init_what=mlp", "config.train.init_what='mlp'", "init_from"),
    (f"train.init_from={NOTHING}", "config.train.init_from", NOTHING),
    ("train.accept_changes=perhaps", "config.train.accept_changes"),
    ("seed=-1", "config.seed", "-1"),
    ("seed=1099511627776", "config.seed", "1099511627776"),
    ("optimizer.learning_rate=nan", "config.optimizer.learning_rate", "nan"),
    ("optimizer.learning_rate=inf", "config.optimizer.learning_rate", "finite"),
    ("optimizer.learning_rate=fast", "config.optimizer.learning_rate=fast"),
    ("optimizer.name=adamm", "config.optimizer", "'adamm'", "adamw"),
    ("optimizer.decay=cosin", "config.optimizer", "cosine"),
    ("optimizer.warmup=5000", "config.optimizer", "5000"),
    ("optimizer.b1=1", "config.optimizer.b1", "[0, 1)"),
    ("ema=constant(decay=", "config.ema", "'constant(decay='", "name(option=value)"),
    ("ema=constant(decay=2)", "config.ema", "2"),
    ("ema=constant(decoy=0.9)", "config.ema", "'decoy'", "decay"),
    ("ema=constant(decay='much')", "config.ema", "has the wrong type"),
    ("ema=constant()", "config.ema", "decay"),
    ("ema=constant(0.9, True, 3)", "config.ema", "too many"),
    ("ema=constant()()", "config.ema", "'constant()()'"),
    ("ema=[]", "config.ema", "'[]'"),
    ("ema=", "config.ema", "''"),
    ("ema=import os", "config.ema", "import os"),
    ("ema=__import__('os').getcwd()", "config.ema", "getcwd"),
    ("objective.name=denoisin", "config.objective.name", "denoising"),
    ("objective.schedule=cosin", "config.objective.schedule", "'cosine'"),
    ("objective.schedule=shifted(cosine, ", "config.objective.schedule", "shifted(cosine"),
    ("objective.schedule=shifted(cosine, -1)", "config.objective.schedule", "-1"),
    ("objective.schedule=shifted(cosine, 'a')", "config.objective.schedule", "shifted"),
    ("objective.schedule=shifted(3, cosine)", "config.objective.schedule", "expected Schedule"),
    (
        "objective.schedule=zero_terminal_snr(rectified_flow)",
        "config.objective.schedule",
        "a table",
    ),
    ("objective.schedule=zero_terminal_snr(vp_sde)", "config.objective.schedule", "a table"),
    ("objective.schedule=linear(steps=1000000000)", "config.objective.schedule", "[1, 100000]"),
    ("objective.schedule=linear(steps=-5)", "config.objective.schedule", "[1, 100000]"),
    ("objective.schedule=vp_sde(beta_min=-3)", "config.objective.schedule", "beta_min"),
    ("objective.schedule=ve(sigma_min=0)", "config.objective.schedule", "sigma_min"),
    ("objective.schedule=edm(sigma_max=inf)", "config.objective.schedule", "sigma_max"),
    ("objective.schedule=sigmoid(tau=0)", "config.objective.schedule", "tau"),
    (f"objective.schedule={5000 * '-'}1", "config.objective.schedule", "name(option=value)"),
    (f"sampler.solver={5000 * '-'}1", "config.sampler.solver", "name(option=value)"),
    ("objective.times=discrete(steps=-5)", "config.objective.times", "steps", "-5"),
    ("objective.times=discrete(steps=0)", "config.objective.times", "steps", "[1, 8"),
    ("objective.times=mode(scale=3)", "config.objective.times", "scale", "1.75"),
    ("objective.times=logit_normal(std=0)", "config.objective.times", "std"),
    ("objective.weighting=min_snr(gamma=-5)", "config.objective.weighting", "gamma", "-5"),
    ("objective.weighting=p2(k=-1)", "config.objective.weighting", "k must", "-1"),
    ("objective.weighting=edm(sigma_data=0)", "config.objective.weighting", "sigma_data"),
    ("objective.distance=pseudo_huber(c=-1)", "config.objective.distance", "c must"),
    ("sampler.solver=ddim(eta=1.0, eta=0.5)", "config.sampler.solver", "eta twice"),
    ("sampler.solver=deis(orders=(1,2))", "config.sampler.solver", "32 entries"),
    ("sampler.solver=unipc(orders=(1,))", "config.sampler.solver", "32 entries"),
    ("sampler.solver=unipc(corrected=(True,))", "config.sampler.solver", "32 entries"),
    ("sampler.solver=edm(low=5, high=1)", "config.sampler.solver", "low <= high"),
    ("sampler.solver=euler_ancestral(s_noise=-1)", "config.sampler.solver", "s_noise"),
    ("sampler.solver=consistency(sigma_min=90)", "config.sampler.solver", "sigma_min", "90"),
    ("sampler.solver=lcm(sigma_data=0)", "config.sampler.solver", "sigma_data"),
    ("objective.schedule=\udcff\x00ü", "config.objective.schedule"),
    ("objective.prediction=epsilon", "config.objective.prediction", "'eps'"),
    ("objective.label_dropout=1.5", "config.objective.label_dropout", "[0, 1]"),
    ("objective.weighting=min_snr(gamma='x')", "config.objective.weighting", "gamma"),
    ("model.name=mlpp", "config.model.name", "'mlp'"),
    ("model.name=unet", "config.model.name", "points"),
    ("model.mlp.width=0", "config.model.mlp.width", "positive"),
    ("model.mlp.width=wide", "config.model.mlp.width=wide"),
    ("model.mlp.depth=99999999", "config.model.mlp.depth", "10,000"),
    ("data.name=digitz", "config.data.name", "'digits'"),
    ("data.name=", "config.data.name", "digits"),
    ("data.density=three_moons", "config.data", "two_moons"),
    ("data.flip=True", "config.data.flip", "images"),
    ("data.buckets=aspect(", "config.data.buckets", "aspect("),
    ("data.background=(1, 2)", "config.data.background", "(1, 2)"),
    ("data.held_out=1", "config.data.held_out", "[0, 1)"),
    ("data.std=0", "config.data.std", "positive"),
    ("data.workers=-1", "config.data.workers", "-1"),
    ("sampler.solver=dpmpp_4m", "config.sampler.solver", "dpmpp_3m"),
    ("sampler.solver=ddim(eta='a')", "config.sampler.solver", "eta"),
    (f"sampler.solver=from_file(path='{NOTHING}')", "config.sampler.solver", NOTHING),
    (
        f"sampler.solver=from_file(path='{__file__}')",
        "config.sampler.solver",
        "not a solver's table",
    ),
    ("sampler.steps=-1", "config.sampler.steps", "-1"),
    ("sampler.grid=karras(rho=0)", "config.sampler.grid", "rho"),
    ("sampler.grid=karras(rho=", "config.sampler.grid", "karras(rho="),
    ("sampler.guidance=3.0", "config.sampler.guidance=3.0", "cfg(3.0)"),
    ("sampler.guidance=strong", "config.sampler.guidance", "'strong'", "cfg"),
    ("sampler.guidance=cfg(", "config.sampler.guidance", "'cfg('"),
    ("sampler.guidance=('cfg(2)', 'cfg(3)')", "config.sampler.guidance", "more than once"),
    ("sampler.guidance=clip(), cfg(3)", "config.sampler.guidance", "before clip"),
    ("sampler.guidance=cfg(2), perturbed_attention(1, '[')", "config.sampler.guidance", "regular"),
    (f"sampler.guidance=autoguidance('{NOTHING}', 2)", "config.sampler.guidance", NOTHING),
    ("sampler.acceleration=cache(every(m=2))", "config.sampler.acceleration", "'m'", "n"),
    ("sampler.acceleration=cache(every(2))", "config.sampler.acceleration", "keep=1", "MLP"),
    ("sampler.acceleration=merge_tokens(0.8)", "config.sampler.acceleration", "[0, 0.75]"),
    ("parallel=both", "config.parallel", "fsdp"),
    ("train.validation_metrics=frechet(pixels)", "config.train.validate_every", "is 0"),
    ("evaluation.metrics=recognition(svm)", "config.evaluation.metrics", "digits_svc"),
    (
        f"evaluation.metrics=frechet(lenet5('{NOTHING}'))",
        "config.evaluation.metrics",
        NOTHING,
    ),
    ("evaluation.metrics=bits(odes())", "config.evaluation.metrics", "'ode'"),
    ("evaluation.metrics=3", "config.evaluation.metrics=3"),
    ("samples.prompt=a cat", "config.samples", "neither labels nor texts"),
]


@pytest.mark.parametrize("override, names", [(c[0], c[1:]) for c in CASES], ids=lambda v: str(v))
def test_a_config(tmp_path, override, names):
    workdir = tmp_path / "run"
    error, _ = command(f"--workdir={workdir}", f"--config.{override}")
    assert_names(error, *names)
    assert not workdir.exists()


@pytest.mark.parametrize(
    "text, names",
    [
        ("def get_config(:", ("--config", "broken.py", "line 1")),
        ("x = 3", ("--config", "broken.py", "get_config")),
        ("import nothing_of_this_name", ("--config", "broken.py", "nothing_of_this_name")),
        ("def get_config(): return 3 / 0", ("--config", "broken.py, line 1", "division by zero")),
        ("\x00\x01", ("--config", "broken.py")),
        ("{'seed': true}", ("--config", "broken.py")),
        (None, ("--config", "broken.py", "no such file")),
    ],
    ids=("syntax", "no get_config", "import", "raises", "null bytes", "JSON", "absent"),
)
def test_a_config_file(tmp_path, text, names):
    file, workdir = tmp_path / "broken.py", tmp_path / "run"
    if text is not None:
        file.write_text(text)
    error, _ = command(f"--workdir={workdir}", config=file)
    assert_names(error, *names)
    assert not workdir.exists()


def test_a_mode(tmp_path):
    error, _ = command(f"--workdir={tmp_path / 'run'}", "--mode=trian")
    assert_names(error, "mode", "train")


@pytest.mark.parametrize("mode", ["train", "sample", "inspect"])
def test_a_file_in_place_of_the_workdir(tmp_path, mode):
    file = tmp_path / "run"
    file.write_text("mine")
    error, _ = command(f"--workdir={file}", f"--mode={mode}")
    assert_names(error, file)
    assert file.read_text() == "mine"
