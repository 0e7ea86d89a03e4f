"""Train, draw from and judge diffusion models; use pretrained ones.

    python main.py --config=configs/digits.py --workdir=runs/digits
    python main.py --mode=sample --workdir=runs/digits
    python main.py --mode=generate --config.model.path=MODEL --config.samples.prompt="a lighthouse"

MODEL is a run's workdir, a folder as diffusers saves it, a .safetensors file or a hub id. A run
knows its own configuration: without --config, it is that of the run in --workdir or
--config.model.path. To train anew with it: --config=runs/digits/config.json. --config=digits is
short for configs/digits.py. Any field can be overridden: --config.objective.prediction=eps

Trains over several processes where SLURM, Open MPI or Kubernetes started them, or where each is
given --coordinator=HOST:PORT --num_processes=N --process_id=I.
"""

import ast
import difflib
import importlib
import io
import json
import os
import runpy
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
    # XLA's CPU collectives deadlock without a thread per virtual device; read as JAX is imported.
    os.environ.setdefault("NPROC", "16")
# XLA alarms at each compilation that takes minutes. Its errors reach Python as exceptions anyway.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

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
    if not argv[1:]:
        sys.exit(
            "error: nothing to do. --config=configs/digits.py --workdir=runs/digits trains, "
            "--mode=sample --workdir=RUN draws; --help lists all modes and configs"
        )
    if given.keys() & {"help", "h", "helpfull"}:
        sys.exit(usage())
    mode = given.get("mode", "train")
    if mode not in modes():
        sys.exit(f"error: --mode={mode}: there is no such mode{_near(mode, modes())}")
    workdir = given.get("workdir") or None
    config = _config(mode, given)
    for name, value in given.items():
        if name.startswith("config."):
            _check_field(name, value, config)
    from diffusion.config import effects

    try:
        effects.check(mode, [name[7:] for name in given if name.startswith("config.")])
    except ValueError as error:
        sys.exit(f"error: {error}")
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
    if (
        not workdir
        and mode not in ("generate", "cache", "compare")
        and not given.get("config.evaluation.samples")
    ):
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
    for path in (model, workdir) if mode != "compare" else ():  # which is of several runs
        if path and _is_run(Path(path)):
            config = _of_run(path)
            if path == model:
                config.model.path = model
            return config
    draws = mode in ("sample", "evaluate", "sweep", "learn", "generate")
    judges = mode in ("evaluate", "reference") and given.get("config.evaluation.samples")
    if not (model and draws) and not judges and mode != "compare":
        what = "--workdir=RUN, or --config.model.path=MODEL, a run, a diffusers folder, a "
        what = what + ".safetensors file or a hub id" if draws else "--workdir=RUN, which has one"
        sys.exit(
            f"error: --mode={mode} needs --config, such as --config=configs/digits.py (--help "
            f"lists all), or {what}" + (f" (there is no run in {workdir})" if workdir else "")
        )
    from configs import base

    return base.get_config()


def _is_run(folder: Path) -> bool:
    """Whether a run left its config there, also where only its checkpoints have it still."""
    return (folder / CONFIG).is_file() or any(folder.glob("checkpoints/[0-9]*/about.json"))


def _of_run(workdir: str | Path) -> ConfigDict:
    """The config that a run was started with."""
    from diffusion.runs import workdir as workdirs

    try:
        found = workdirs.read_config(workdir)
    except ValueError as error:
        sys.exit(f"error: {error}")
    return _updated(found, Path(workdir) / CONFIG)


def _updated(found: object, path: Path) -> ConfigDict:
    """The base config with what a JSON file holds."""
    from configs import base

    config = base.get_config()
    if not isinstance(found, dict) or not found.keys() & config.keys():
        sys.exit(
            f"error: {path} holds no config of this project: expected a run's config.json, with "
            "sections such as data, model and train. A model to draw from is named by "
            "--config.model.path"
        )
    try:
        config.update(found)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        sys.exit(f"error: {path} is of another version of this project: {error}")
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
    named = ROOT / "configs" / f"{file.removesuffix('.py')}.py"
    if os.path.isdir(file) and _is_run(Path(file)):
        return _of_run(file)
    if not os.path.isfile(file) and named.is_file() and Path(file).name == file:
        file = str(named)  # --config=digits
    if not os.path.isfile(file):
        names = [f"configs/{p.name}" for p in sorted((ROOT / "configs").glob("[!_]*.py"))]
        what = "the folder holds no run" if os.path.isdir(file) else "there is no such file"
        sys.exit(f"error: --config={path}: {what}{_near(file, names)}")
    if Path(file).name == CONFIG and Path(file).with_name("starts.jsonl").exists():
        return _of_run(Path(file).parent)
    try:
        if file.endswith(".json"):
            from diffusion.runs.workdir import tuples

            return _updated(tuples(json.loads(Path(file).read_text())), Path(file))
        module = runpy.run_path(file)
        if "get_config" not in module:
            sys.exit(f"error: --config={path}: the file has no function get_config")
        return module["get_config"](*[argument] if colon else [])
    except (SyntaxError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        line = f", line {error.lineno}" if getattr(error, "lineno", None) else ""
        text = getattr(error, "msg", "not a text")
        kind = "config.json" if file.endswith(".json") else "Python file with a config"
        sys.exit(f"error: --config={path}{line}: it is no {kind}: {text}")
    except Exception as error:
        if os.environ.get("TRACEBACK"):
            raise
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
        line = f", line {lines[-1]}" if lines else ""
        sys.exit(f"error: --config={path}{line}: {error}\n{DEBUG}")


def _check_field(name: str, given: str, config: ConfigDict) -> None:
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
        if "name" in value:
            sys.exit(f"error: {name} is a section, not a field. Did you mean {name}.name={given}?")
        sys.exit(f"error: {name} is a section, not a field; it has {', '.join(sorted(value))}")


def _near(name: str, valid: list[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.4)
    return f". Did you mean {prefix}{near[0]}?" if near else f"; choose one of {', '.join(valid)}"


if __name__ == "__main__":
    main(sys.argv)
