"""Where a model's files are: a folder on this machine, or an id on the Hugging Face hub.

The hub's library keeps fetched files in its own cache and looks there first; ``HF_HOME``,
``HF_TOKEN``, ``HF_HUB_OFFLINE`` and its other environment variables apply.
"""

from __future__ import annotations

import re
from pathlib import Path

from diffusion.pretrained import files, folders

_ID = r"[\w.-]+(?:/[\w.-]+)?"
_NO_WEIGHTS = ("*.json", "*.txt", "*.model")
_UNUSED = ("safety_checker/*", "*flax*", "*openvino*", "*.onnx*")


def locate(
    path_or_id: str | Path,
    subfolder: str | None = None,
    *,
    variant: str | None = None,
    revision: str | None = None,
    weights: bool = True,
) -> Path:
    """The folder of a model or pipeline, fetched from the hub if this machine has none.

    Args:
      path_or_id: a folder, or 'owner/name' on the hub. An existing folder wins.
      subfolder: of it; only this one is fetched.
      variant: fetch these weights only.
      revision: a branch, tag or commit on the hub, 'main' by default.
      weights: whether to fetch weights, or configurations and tokenizers only.

    Raises:
      FileNotFoundError: there is no such folder, and the hub has none or cannot be reached.
      ValueError: for a file.
    """
    path = Path(path_or_id).expanduser()
    if not path.exists():
        path = _fetch(str(path_or_id), _patterns(subfolder, variant, weights), revision)
    if path.is_file():
        if path.suffix in files.PICKLES:
            raise files.refuse_pickle(path)
        raise ValueError(
            f"{path} is a file, not a folder; single-file checkpoints in the original naming are"
            " read by pipelines.from_single_file.open_checkpoint and pretrained.single_file"
        )
    folder = path / (subfolder or "")
    if not folder.is_dir():
        what = f"{path} holds no subfolder {subfolder!r}" if subfolder else f"{path} is no folder"
        raise FileNotFoundError(what)
    return folder


def adapter(repo: str) -> Path:
    """The folder of an adapter's repository on the hub, 'owner/name'.

    Raises:
      FileNotFoundError: the hub has none or cannot be reached.
    """
    if repo.count("/") != 1 or repo.endswith(".safetensors"):
        raise FileNotFoundError(f"no such file or folder: {repo}")
    return _fetch(repo, ["*.safetensors", "adapter_config.json"], None)


def _patterns(subfolder: str | None, variant: str | None, weights: bool) -> list[str]:
    """The files to fetch from a repository: shell patterns, whose ``*`` matches ``/`` as well.

    Repositories hold the same weights several times (variants, pickles, single files); of each
    model only one set is fetched.
    """
    names = list(_NO_WEIGHTS)
    for base in (folders.DIFFUSERS, folders.TRANSFORMERS) if weights else ():
        shards = "-[0-9][0-9][0-9][0-9][0-9]-of-[0-9][0-9][0-9][0-9][0-9]"
        former = f".{variant}" if variant else ""
        single = folders.single_name(base, variant)
        stem = single.removesuffix(".safetensors")
        names += [single, f"{stem}{shards}.safetensors", f"{base}{shards}{former}.safetensors"]
    names = list(dict.fromkeys(names))
    if subfolder:
        return [f"{subfolder}/{name}" for name in names]
    return names + [f"*/{name}" for name in names if name not in _NO_WEIGHTS]


def _fetch(repo: str, allow: list[str], revision: str | None) -> Path:
    if not re.fullmatch(_ID, repo):
        raise FileNotFoundError(f"no such folder: {repo}")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    unused = [pattern for pattern in _UNUSED if not any(a.startswith(pattern[:-1]) for a in allow)]
    try:
        folder = huggingface_hub.snapshot_download(
            repo, revision=revision, allow_patterns=allow, ignore_patterns=unused
        )
    # Errors of connection come from the library below; all are OSErrors or one of these.
    except (OSError, HfHubHTTPError, HFValidationError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise FileNotFoundError(
            f"no such folder: {repo}; and as an id it could not be fetched from the Hugging Face"
            f" hub: {type(error).__name__}: {reason}"
        ) from error
    return Path(folder)
