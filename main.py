"""Train, draw from and judge diffusion models; use pretrained ones.

    python main.py --config=configs/digits.py --workdir=runs/digits
    python main.py --mode=sample --workdir=runs/digits
    python main.py --mode=generate --config.model.path=MODEL --config.samples.prompt="a lighthouse"

MODEL is a run's workdir, a folder as diffusers saves it, a .safetensors file or a hub id. A run
knows its own configuration: without --config, it is that of the run in --workdir or
--config.model.path. To train anew with it: --config=runs/digits/config.json. Any field can be
overridden: --config.objective.prediction=eps

Trains over several processes where SLURM, Open MPI or Kubernetes started them, or where each is
given --coordinator=HOST:PORT --num_processes=N --process_id=I.
"""

import ast
import difflib
import importlib
import io
import os
import runpy
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
    # XLA's CPU collectives deadlock without a thread per virtual device; read as JAX is imported.
    os.environ.setdefault("NPROC", "16")

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

ROOT = Path(__file__).parent
DEBUG = "(with TRACEBACK=1 in the environment: where in the code)"
CONFIG = "config.json"


class Command(NamedTuple):
    """What was typed."""

    mode: str
    config: ConfigDict
    workdir: str | None
    coordinator: str | None
    num_processes: int | None
    process_id: int | None


def main(argv: list[str]) -> None:
    """Does what ``argv`` says; a user's mistake ends the program with one line."""
    command = parse(argv)
    logging.set_verbosity(logging.WARNING)
    sys.stdout.reconfigure(line_buffering=True)  # a killed run's last words reach its log
    import jax  # not before flags are parsed: mistakes there should show at once

    from diffusion import compiler, processes

    tuned = compiler.tune()
    try:  # before anything can use a device
        count = processes.join(command.coordinator, command.num_processes, command.process_id)
        if count > 1 and command.mode != "train":
            raise ValueError(f"--mode={command.mode} runs in one process, not in {count}")
    except ValueError as error:
        sys.exit(f"error: {error}")
    if count > 1 and jax.process_index() > 0:  # one process prints
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

    mode = importlib.import_module(f"diffusion.modes.{command.mode}")
    try:
        with memory_advice.explained(command.config, command.mode):
            mode.run(command.config, command.workdir)
    except Exception as error:
        processes.leave(error)
        # A user's mistake or a diverged run: the message helps, the traceback would bury it.
        plain = isinstance(error, ValueError | OSError | ArithmeticError | MemoryError)
        if os.environ.get("TRACEBACK") or not plain:
            raise
        of_system = isinstance(error, OSError) and error.strerror and error.filename
        text = f"{error.strerror}: {error.filename}" if of_system else error
        sys.exit(f"error: {text}\n{DEBUG}")


def parse(argv: list[str]) -> Command:
    """The command; mistakes end the program with a line that names the field or the file."""
    given = _given(argv)
    if given.keys() & {"help", "h", "helpfull"}:
        sys.exit(usage())
    mode = given.get("mode", "train")
    if mode not in modes():
        sys.exit(f"error: --mode={mode}: there is no such mode{_near(mode, modes())}")
    workdir = given.get("workdir") or None
    config = _config(mode, given)
    for name in given:
        if name.startswith("config."):
            _check_field(name, config)
    values = flags.FlagValues()
    options = {"flag_values": values}
    flags.DEFINE_string("workdir", None, "Where checkpoints, logs and pictures go.", **options)
    flags.DEFINE_string("mode", "train", "What to do.", **options)
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, of several.", **options)
    flags.DEFINE_integer("num_processes", None, "How many processes train together.", **options)
    flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", **options)
    rest = [argv[0], *_without_config(argv[1:])]
    try:
        config_flags.DEFINE_config_dict("config", config, sys_argv=rest, **options)
        others = values(rest)[1:]
    except flags.Error as error:
        sys.exit(f"error: {error}")
    if others:
        sys.exit(f"error: unexpected arguments: {' '.join(others)}")
    if not workdir and mode not in ("generate", "cache"):
        sys.exit("error: --workdir is needed: where to put what comes out")
    cluster = values["coordinator"].value, values["num_processes"].value, values["process_id"].value
    return Command(mode, values["config"].value, workdir, *cluster)


def modes() -> list[str]:
    """The names of all modes: the files in diffusion/modes/."""
    files = sorted((ROOT / "diffusion" / "modes").glob("*.py"))
    return [path.stem for path in files if not path.stem.startswith("_")]


def usage() -> str:
    """The module's text, with every mode and config that there is."""
    lines = [__doc__.strip(), "", "Modes (--mode=):"]
    for name in modes():
        text = ast.get_docstring(ast.parse((ROOT / "diffusion/modes" / f"{name}.py").read_text()))
        lines.append(f"  {name:<9} {text.splitlines()[0].partition(': ')[2]}")
    lines += ["", "Configs (--config=):"]
    for path in sorted((ROOT / "configs").glob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text()))
        if text and path.stem != "base":
            lines.append(f"  configs/{path.name}: {text.splitlines()[0]}")
    return "\n".join([*lines, "", "Every field, with its default: configs/base.py"])


def _config(mode: str, given: dict[str, str]) -> ConfigDict:
    """The config of a file, or without one that of the run, or the default."""
    if "config" in given:
        return _load(given["config"])
    model, workdir = given.get("config.model.path", ""), given.get("workdir", "")
    for path in (model, workdir):
        if path and (Path(path) / CONFIG).is_file():
            config = _of_run(path)
            if path == model:
                config.model.path = model
            return config
    if not model:
        sys.exit(
            f"error: --mode={mode} needs --config, such as --config=configs/digits.py (--help "
            "lists all), or a model: --workdir=RUN, or --config.model.path=MODEL, a run, a "
            "diffusers folder, a .safetensors file or a hub id"
            + (f" (there is no run in {workdir})" if workdir else "")
        )
    from configs import base

    return base.get_config()


def _of_run(workdir: str | Path) -> ConfigDict:
    """The config that a run was started with."""
    from configs import base
    from diffusion.runs import workdir as workdirs

    config = base.get_config()
    try:
        config.update(workdirs.read_config(workdir))
    except ValueError as error:
        sys.exit(f"error: {error}")
    except (KeyError, TypeError, AttributeError) as error:
        sys.exit(f"error: {Path(workdir) / CONFIG} is of another version of this project: {error}")
    return config


def _given(argv: list[str]) -> dict[str, str]:
    """Flags by name, with the values that follow "=" or come next."""
    given = {}
    for argument, following in zip(argv, [*argv[1:], ""]):
        if argument.startswith("-"):
            name, equals, value = argument.lstrip("-").partition("=")
            given[name] = value if equals else following
    return given


def _without_config(arguments: list[str]) -> list[str]:
    """The arguments without --config=FILE, which is read already."""
    kept, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in ("--config", "-config"):
            skip = True
        elif not argument.startswith(("--config=", "-config=")):
            kept.append(argument)
    return kept


def _load(path: str) -> ConfigDict:
    """The config in a file; one that cannot be had ends the program with a line that says why."""
    file, colon, argument = path.partition(":")
    if not os.path.isfile(file):
        names = [f"configs/{p.name}" for p in sorted((ROOT / "configs").glob("*.py"))]
        sys.exit(f"error: --config={path}: there is no such file{_near(file, names)}")
    if Path(file).name == CONFIG:
        return _of_run(Path(file).parent)
    try:
        module = runpy.run_path(file)
        if "get_config" not in module:
            sys.exit(f"error: --config={path}: the file has no function get_config")
        return module["get_config"](*[argument] if colon else [])
    except (SyntaxError, UnicodeDecodeError) as error:
        line = f", line {error.lineno}" if getattr(error, "lineno", None) else ""
        text = getattr(error, "msg", "not a text")
        sys.exit(f"error: --config={path}{line}: it is no Python file with a config: {text}")
    except Exception as error:
        if os.environ.get("TRACEBACK"):
            raise
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
        line = f", line {lines[-1]}" if lines else ""
        sys.exit(f"error: --config={path}{line}: {error}\n{DEBUG}")


def _check_field(name: str, config: ConfigDict) -> None:
    path, value = "config", config
    for part in name.split(".")[1:]:
        if not isinstance(value, ConfigDict):
            sys.exit(f"error: {path} has no fields of its own, so there is no {name}")
        if part not in value:
            listed = ", ".join(sorted(value.keys()))
            hint = _near(part, value.keys(), f"{path}.")
            sys.exit(f"error: unknown field {name}; {path} has {listed}{hint}")
        path, value = f"{path}.{part}", value[part]
    if isinstance(value, ConfigDict):
        example = next(iter(value), "")
        sys.exit(f"error: {name} is a section, not a field; set {name}.{example}, say")


def _near(name: str, valid: list[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.4)
    return f". Did you mean {prefix}{near[0]}?" if near else f"; choose one of {', '.join(valid)}"


if __name__ == "__main__":
    main(sys.argv)
