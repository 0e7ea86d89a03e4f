"""References: statistics, features and pictures of real examples in an ``.npz``.

One file serves all who read it. Its arrays have the names that others gave them:

    mu [D], sigma [D, D]          statistics of all examples: ADM's, EDM's, EDM2's and clean-fid's
    mu_s, sigma_s                 of the spatial features (sFID): ADM's
    feats [K, D] float32          features of some examples: clean-fid's
    arr_0 [K, H, W, C] uint8      the same examples as pictures: ADM's; arr_1 their classes
    about                         JSON: network, weights, preparation, count, resolution, data

Files of others have some of these, and no ``about``. EDM2's pickles must be converted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffusion.evaluation import npz
from diffusion.evaluation.moments import Moments
from diffusion.evaluation.networks.network import Network
from diffusion.evaluation.sets import CHUNK, Set

OUTPUTS = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
ADM = "inception2015"


def read(path: str, net: Network) -> Set:
    """The real examples of a reference as a network sees them.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is damaged, or of another network, other weights or another preparation.
    """
    arrays = npz.read(path)
    about = _about(path, arrays)
    if not arrays.keys() & {"mu", "feats", "arr_0"}:
        raise ValueError(
            f"{path} is no reference: expected mu and sigma, feats or arr_0, got "
            f"{', '.join(sorted(arrays)) or 'nothing'}"
        )
    if about:
        _check_same(path, about, net)
    elif arrays.keys() & {"mu", "feats"} and not net.name.startswith(ADM):
        raise ValueError(
            f"{path} does not say which network it is of; such files are of {ADM}, not {net.name}"
        )
    count = int(about.get("count", 0))
    known = {
        output: _moments(path, arrays, names, count)
        for output, names in OUTPUTS.items()
        if names[0] in arrays
    }
    pictures, feats = arrays.get("arr_0"), arrays.get("feats")
    if pictures is not None:
        if pictures.dtype != np.uint8 or len(pictures.shape) != 4:
            raise ValueError(
                f"{path}: arr_0 must be uint8 [N, H, W, C], got {pictures.dtype} {pictures.shape}"
            )
        npz.check_bytes(pictures)
    if feats is not None and (feats.dtype.kind != "f" or len(feats.shape) != 2):
        raise ValueError(f"{path}: feats must be float [N, D], got {feats.dtype} {feats.shape}")
    width = len(known["features"].mean) if "features" in known else None
    if feats is not None and width not in (None, feats.shape[1]):
        raise ValueError(f"{path}: mu has {width} features, and feats {feats.shape[1]}")
    listed = [arrays[name] for name in ("feats", "arr_0", "arr_1") if name in arrays]
    held = feats if feats is not None else pictures
    number = 0 if held is None else held.shape[0]
    if held is not None and (not number or {a.shape[:1] for a in listed} != {(number,)}):
        shapes = ", ".join(f"{a.name} {list(a.shape)}" for a in listed)
        raise ValueError(f"{path}: expected feats, arr_0 and arr_1 of the same examples: {shapes}")
    computed: dict[str, list[np.ndarray]] = {}

    def chunks(output: str) -> Iterator[np.ndarray]:
        if output == "features" and feats is not None:
            for x in feats.chunks(CHUNK):
                if not np.isfinite(x).all():
                    raise ValueError(f"{path}: feats contain NaN or infinity")
                yield x
        elif pictures is not None:
            if output not in computed:
                parts = (net(x, [None] * len(x), (output,)) for x in pictures.chunks(CHUNK))
                computed[output] = [part[output] for part in parts]
            yield from computed[output]
        else:
            raise ValueError(
                f"{path} has statistics only; this metric needs feats or pictures, arr_0"
            )

    labels = arrays["arr_1"].whole().tolist() if number and "arr_1" in arrays else ()
    shape = tuple(about.get("resolution", pictures.shape[1:] if pictures is not None else ()))
    facts = {"checksum": _checksum(path), "statistics_of": count}
    name = str(about.get("data", Path(path).name))
    return Set(name, number, chunks, labels, facts, known, shape)


def write(
    path: Path,
    net: Network,
    moments: Mapping[str, Moments],
    feats: np.ndarray,
    pictures: tuple[tuple[int, ...], Iterable[np.ndarray]] | None,
    labels: np.ndarray | None,
    about: Mapping[str, Any],
) -> None:
    """Writes a reference.

    Args:
      path: of the file.
      net: the network.
      moments: of all examples, by output.
      feats: features [K, D] of some of them.
      pictures: shape [K, H, W, C] and chunks of the same ones, uint8, or None.
      labels: their classes [K], or None.
      about: data, resolution: what else a report says.
    """
    arrays: dict[str, np.ndarray] = {}
    for output, (mean, cov) in OUTPUTS.items():
        if output in moments:
            arrays |= {mean: moments[output].mean, cov: moments[output].cov}
    if len(feats):
        arrays["feats"] = np.asarray(feats, np.float32)
    if labels is not None:
        arrays["arr_1"] = labels
    facts = net.about | {"count": moments["features"].count} | dict(about)
    arrays["about"] = np.array(json.dumps(facts))
    written = {name: (a.shape, a.dtype, (a,)) for name, a in arrays.items()}
    if pictures is not None:
        written["arr_0"] = (pictures[0], np.dtype(np.uint8), pictures[1])
    npz.write(path, written)


def _about(path: str, arrays: Mapping[str, npz.Member]) -> dict[str, Any]:
    if "about" not in arrays:
        return {}
    try:
        about = json.loads(str(arrays["about"].whole()))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its description is damaged: {error}") from error
    about = about if isinstance(about, dict) else {"network": about}
    for name, default in (("count", 0), ("resolution", [])):
        value = about.get(name, default)
        numbers = value if isinstance(value, list) else [value]
        if type(value) is not type(default) or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError(f"{path}: its description is damaged: {name} is {value!r:.100}")
    return about


def _check_same(path: str, about: Mapping[str, Any], net: Network) -> None:
    for name, own in net.about.items():
        if about.get(name) != own:
            raise ValueError(
                f"{path} was made with {name} {about.get(name)!r}, and the network here has "
                f"{own!r}: figures by it would mean nothing. Make it anew with --mode=reference"
            )


def _moments(
    path: str, arrays: Mapping[str, npz.Member], names: tuple[str, str], count: int
) -> Moments:
    mean, cov = (arrays[name].whole() if name in arrays else np.zeros(0) for name in names)
    if (
        mean.dtype.kind != "f"
        or cov.dtype.kind != "f"
        or mean.ndim != 1
        or cov.shape != (len(mean), len(mean))
    ):
        raise ValueError(
            f"{path}: expected floats {names[0]} [D] and {names[1]} [D, D], got "
            f"{mean.shape}, {cov.shape}, {mean.dtype} and {cov.dtype}"
        )
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise ValueError(f"{path}: {names[0]} or {names[1]} contain NaN or infinity")
    if (
        np.abs(cov - cov.T).max(initial=0) > 1e-3 * np.abs(cov).max(initial=0)
        or (cov.diagonal() < 0).any()
    ):
        raise ValueError(f"{path}: {names[1]} is no covariance: it is not symmetric, or below 0")
    return Moments(count, mean.astype(np.float64), cov.astype(np.float64))


def _checksum(path: str) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
