"""Train, sample from or evaluate a diffusion model, or use a pretrained one.

    python main.py --config=configs/digits.py --workdir=runs/digits
    python main.py --config=configs/digits.py --workdir=runs/digits --mode=inspect
    python main.py --config=configs/digits.py --workdir=runs/digits --mode=sample
    python main.py --config=configs/digits.py --workdir=runs/digits --mode=evaluate
    python main.py --config=configs/digits.py --workdir=runs/digits --mode=sweep
    python main.py --config=configs/digits.py --workdir=runs/digits --mode=learn
    python main.py --config=configs/digits.py --workdir=runs/digits --mode=profile
    python main.py --config=configs/emoji_text_to_image.py --workdir=runs/emoji --mode=cache
    python main.py --config=configs/mnist.py --workdir=DATA/photos --mode=prepare \
        --config.data.name=folder --config.data.dir=PHOTOS
    python main.py --config=configs/stable_diffusion.py --mode=generate \
        --config.model=DIR_OR_HUB_ID --config.prompt="a lighthouse at dusk"

Any field of the config can be overridden: --config.objective.prediction=eps

Trains over several processes where SLURM, Open MPI or Kubernetes started them, or where each is
given --coordinator=HOST:PORT --num_processes=N --process_id=I.
"""

import difflib
import importlib
import io
import os
import runpy
import sys
import traceback

if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
    # XLA's CPU collectives deadlock without a thread per virtual device; read as JAX is imported.
    os.environ.setdefault("NPROC", "16")

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment, a file in configs/.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, logs and pictures go.")
_MODES = ["train", "sample", "evaluate", "sweep", "learn", "cache", "inspect", "prepare"]
_MODES += ["profile", "generate"]
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, of several.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes train together.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
_MODE = flags.DEFINE_enum("mode", "train", _MODES, "What to do.")


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    sys.stdout.reconfigure(line_buffering=True)  # a killed run's last words reach its log
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    import jax  # not before flags are parsed: mistakes there should show at once

    from diffusion import compiler, processes

    tuned = compiler.tune()
    try:  # before anything can use a device
        count = processes.join(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
        if count > 1 and _MODE.value != "train":
            raise ValueError(f"--mode={_MODE.value} runs in one process, not in {count}")
    except ValueError as error:
        sys.exit(f"error: {error}")
    if count > 1 and jax.process_index() > 0:  # one tells
        sys.stdout = io.StringIO()
    print(tuned)

    from diffusion.config import memory_advice

    # What was compiled once need not be again: the next run of this config starts sooner.
    cache = os.path.join(os.path.expanduser("~"), ".cache", "diffusion-jax")
    jax.config.update(
        "jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", cache)
    )
    # By default what compiles in less than a second is not kept; a run has dozens of such.
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

    generates = _MODE.value == "generate"
    # Only what the mode needs: all of it would take a second more to import.
    modules = {"train": "train", "generate": "generate", "profile": "profile"}
    module = f"diffusion.modes.{modules.get(_MODE.value, 'others')}"
    run = getattr(importlib.import_module(module), _MODE.value)
    try:
        if generates == ("train" in _CONFIG.value):
            fitting = "configs/stable_diffusion.py" if generates else "a config of an experiment"
            raise ValueError(f"--mode={_MODE.value} takes {fitting}")
        with memory_advice.explained(_CONFIG.value, _MODE.value):
            run(_CONFIG.value, _WORKDIR.value)
    except Exception as error:
        processes.leave(error)
        # A user's mistake or a diverged run: the message helps, the traceback would bury it.
        told = isinstance(error, ValueError | OSError | ArithmeticError | MemoryError)
        if os.environ.get("TRACEBACK") or not told:
            raise
        told = isinstance(error, OSError) and error.strerror and error.filename
        text = f"{error.strerror}: {error.filename}" if told else error
        sys.exit(f"error: {text}\n(with TRACEBACK=1 in the environment: where in the code)")


def parse(argv: list[str]) -> list[str]:
    """Parses flags; mistakes end the program with a line that names the field or the file."""
    try:
        rest = flags.FLAGS(argv)
        if _CONFIG.value is not None:
            _CONFIG.value.to_dict()  # a file that is not there shows only now
        return rest
    except flags.Error as error:
        sys.exit(f"error: {error}")
    except Exception:
        given = _given(argv)
        config = _load(given.get("config", ""))
        for name in given:
            if name.startswith("config."):
                _check_field(name, config)
        raise


def _given(argv: list[str]) -> dict[str, str]:
    """Flags by name, with the values that follow "=" or come next."""
    given = {}
    for argument, following in zip(argv, [*argv[1:], ""]):
        if argument.startswith("-"):
            name, equals, value = argument.lstrip("-").partition("=")
            given[name] = value if equals else following
    return given


def _load(path: str) -> ConfigDict:
    """The config in a file; one that cannot be had ends the program with a line that says why."""
    file, colon, argument = path.partition(":")
    if not os.path.isfile(file):
        sys.exit(f"error: --config={path}: there is no such file")
    try:
        module = runpy.run_path(file)
        if "get_config" not in module:
            sys.exit(f"error: --config={path}: the file has no function get_config")
        return module["get_config"](*[argument] if colon else [])
    except SyntaxError as error:
        line = f", line {error.lineno}" if error.lineno else ""
        sys.exit(f"error: --config={path}{line}: {error.msg}")
    except Exception as error:
        if os.environ.get("TRACEBACK"):
            raise
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
        line = f", line {lines[-1]}" if lines else ""
        sys.exit(
            f"error: --config={path}{line}: {error}\n"
            "(with TRACEBACK=1 in the environment: where in the code)"
        )


def _check_field(name: str, config: ConfigDict) -> None:
    path = "config"
    for part in name.split(".")[1:]:
        if not isinstance(config, ConfigDict):
            sys.exit(f"error: {path} has no fields of its own, so there is no {name}")
        if part not in config:
            near = difflib.get_close_matches(part, config.keys(), n=1)
            hint = f" Did you mean {path}.{near[0]}?" if near else ""
            sys.exit(
                f"error: unknown field {name}; {path} has {', '.join(sorted(config.keys()))}.{hint}"
            )
        path, config = f"{path}.{part}", config[part]


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    flags.register_multi_flags_validator(
        ["workdir", "mode"],
        lambda given: given["workdir"] or given["mode"] == "generate",
        "--workdir is needed: where to put what comes out",
    )
    app.run(main, flags_parser=parse)
