"""Adapters of a model's weights, as specs: "style.safetensors", "runs/lora(0.8)".

What a spec names is a file, a folder as PEFT or diffusers saves it, an id on the Hugging Face hub,
or the workdir of a run that trained one. Its strength is one number, or several by name,

    "style.safetensors(0.8, text=0.5, up=(1, (1, 0.2, 0), 0))"

which are ``Strengths``' fields. At strength 0 a model computes what it does without the adapter.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from PIL import Image

from diffusion import specs
from diffusion.adapters.low_rank.deltas import Deltas
from diffusion.adapters.low_rank.merge import flat_params, merge, whole
from diffusion.errors import field
from diffusion.levels import Array
from diffusion.objectives.adapting import OWN
from diffusion.pipelines import adapted, concepts
from diffusion.pipelines.conditioners import Subject
from diffusion.pipelines.from_pretrained import Opened
from diffusion.pipelines.from_run import Run, is_run, open_run
from diffusion.pipelines.generation import generate
from diffusion.pipelines.pipeline import Params, Pipeline
from diffusion.pipelines.strengths import COMPONENTS, Strengths, strengths
from diffusion.pretrained.adapters import bases, embeddings, factors, layers, reading, writing
from diffusion.pretrained.adapters.embeddings import Word
from diffusion.pretrained.adapters.layers import Table


@dataclass(frozen=True)
class Merged:
    """Adapters that are merged into the parameters of a model.

    Attributes:
      adapters: of each its deltas, and their strengths by path.
    """

    adapters: Sequence[tuple[Deltas, Mapping[str, float]]]

    def pipeline(self, pipeline: Pipeline) -> Pipeline:
        """The same."""
        return pipeline

    def load(self, params: Params) -> Params:
        """The parameters with the adapters in them.

        Raises:
          ValueError: a sum is beyond its parameter's dtype; the message names it.
        """
        made = merge(params, self.adapters)
        before, after = flat_params(params), flat_params(made)
        for path in sorted({whole(path) for deltas, _ in self.adapters for path in deltas}):
            if _finite(before[path]) and not _finite(after[path]):
                raise ValueError(
                    f"with its adapters, {path} has values that {after[path].dtype} cannot hold: "
                    "give them smaller strengths"
                )
        return made


def attach(
    source: Opened | Run, given: str | Sequence[str], name: str = "adapters"
) -> Opened | Run:
    """A model with adapters, which are read and checked here and merged when it is loaded.

    Warns of tensors that belong to no layer of the model.

    Args:
      source: the model.
      given: specs of adapters.
      name: of the field, for errors.

    Raises:
      FileNotFoundError: there is no such file or run.
      ValueError: a file is damaged, or is for another model; the message says what is wrong.
    """
    chosen = []
    for text in listed(given):
        with field(f"{name}={text!r}"):
            path, inside = split(text)
            words = _words(path, inside)
            source = _with_words(source, path, words)
            chosen += [] if words else [text]
    if not chosen:
        return source
    table = _table(source.pipeline, source.shapes)
    adapters = []
    for text in chosen:
        with field(f"{name}={text!r}"):
            path, own = parse(text)
            deltas, words = read(path, table, own)
            adapters.append((deltas, own.by_path(deltas, table)))
            source = _with_words(source, path, words)
    return source.attach(Merged(tuple(adapters)))


def listed(given: str | Sequence[str]) -> list[str]:
    """The specs of a field, which may be one text or several."""
    several = list(given) if isinstance(given, (tuple, list)) else [given]
    return [] if several == [""] else several


def paths(given: str | Sequence[str]) -> list[str]:
    """Those in the specs of a field."""
    return [split(text)[0] for text in listed(given)]


def read(path: str, table: Table, own: Strengths) -> tuple[Deltas, Sequence[Word]]:
    """What a file, a folder, a hub id or a run holds for a model with these layers: its deltas, and
    new words of prompts that are bundled with them.

    Raises:
      FileNotFoundError, ValueError: as ``attach``. An adapter for an encoder that the model does
        not have is refused unless its strength there is 0.
    """
    if is_run(path):
        return _of_run(open_run(path), table), ()
    file = reading.find(path)
    found = reading.read(file, table)
    for component, key in found.absent.items():
        if own.of(component):
            raise ValueError(
                f"{file} changes the {component}, which this model does not have ({key}, ...); "
                f"({COMPONENTS[component]}=0) leaves that out"
            )
    if found.unused:
        shown = ", ".join(found.unused[:3]) + (", ..." if len(found.unused) > 3 else "")
        count = len(found.unused)
        warnings.warn(
            f"{file}: {count} tensors belong to no layer of this model: {shown}", stacklevel=3
        )
    return found.deltas, found.words


def save(
    path: str | Path,
    deltas: Deltas,
    pipeline: Pipeline,
    params: Params,
    *,
    naming: str | None = None,
    dtype: DTypeLike | None = None,
    about: Mapping[str, str] | None = None,
) -> None:
    """Writes an adapter's file for other software; see ``writing.write``.

    ``params`` are the pipeline's, or their shapes.
    """
    table = _table(pipeline, params)
    writing.write(path, deltas, table, naming=naming, dtype=dtype, about=about)


@jax.jit
def _finite(a: Array) -> Array:
    return jnp.isfinite(a).all()


def word(token: str = "") -> str:
    """How prompts write the word of a textual inversion."""
    return token


def _words(path: str, inside: str) -> Sequence[Word]:
    """The words in a file of textual inversion, or of a run that taught one; none of others.

    ``inside`` are the options in their spec's brackets.
    """
    options = f"word({inside})", {"word": word}, "its word"
    if not is_run(path):
        file = reading.find(path)
        return embeddings.read(file, specs.value(*options)) if embeddings.holds(file) else ()
    run = open_run(path)
    if run.base is None or not hasattr(run.adapter, "word"):
        return ()
    taught = run.adapter.word(run.restored[0][OWN])
    return (taught._replace(token=specs.value(*options) or taught.token),)


def _with_words(source: Opened | Run, path: str, words: Sequence[Word]) -> Opened | Run:
    for found in words:
        concepts.check(source.pipeline, found, path)
        source = source.attach(concepts.Concept(found))
    return source


def split(text: str) -> tuple[str, str]:
    """The path in a spec, and what is in the brackets behind it; a text that is a path has none."""
    if not isinstance(text, str) or not text:
        raise ValueError(f"expected a text such as 'style.safetensors(0.8)', got {text!r}")
    return (text, "") if Path(text).exists() else _split(text.strip())


def parse(text: str) -> tuple[str, Strengths]:
    """The path and the strengths in a spec."""
    path, inside = split(text)
    call = {"strengths": strengths}
    return path, specs.value(f"strengths({inside})", call, "its strengths")


def _split(text: str) -> tuple[str, str]:
    """(path, what is in the brackets that end the text)."""
    depth = 0
    for i in range(len(text) - 1, 0, -1) if text.endswith(")") else ():
        depth += (text[i] == ")") - (text[i] == "(")
        if depth == 0:
            return text[:i], text[i + 1 : -1]
    return text, ""


def _table(pipeline: Pipeline, shapes: Params) -> Table:
    encoders: Sequence[nn.Module] = getattr(pipeline.conditioner, "encoders", ())
    return layers.table(pipeline.network, encoders, shapes)


def _of_run(run: Run, table: Table) -> Deltas:
    """What a run trained, for the base that it was trained with or another one like it."""
    if run.base is None:
        raise ValueError(f"{run.path} is a run that trained a whole model: it is for model.path")
    base = run.base.pipeline
    bases.check_context(_table(base, run.base.shapes).context, table.context)
    deltas = adapted.deltas(base, run.adapter, run.restored[0][OWN])
    if deltas is None:
        raise ValueError(
            f"{run.path} holds {run.description.fields['adapter']}, which changes more than "
            "weights: draw from the run itself, or give it to config.control or image_prompts"
        )
    places = {p: layer.shapes[k] for layer in table.layers for k, p in layer.paths.items()}
    for path, delta in deltas.items():
        if path not in places or not factors.fits(delta, places[path]):
            raise ValueError(
                f"{run.path} is for another model: in this one {path} is "
                f"{places.get(path, 'absent')}"
            )
    return deltas


def at_strengths(
    pipeline: Pipeline,
    params: Params,
    path: str,
    strengths: Sequence[float],
    prompt: Subject,
    **options: Any,
) -> list[Image.Image]:
    """Pictures of one prompt, from the same noise, with an adapter at several strengths.

    Nothing is compiled again from one strength to the next.

    Args:
      pipeline, params: what ``load`` gives.
      path: of the adapter, without strengths.
      strengths: of each picture.
      prompt: of all pictures.
      options: those of ``generate``.
    """
    deltas, _ = read(path, _table(pipeline, params), Strengths())
    made = (merge(params, [(deltas, strength)]) for strength in strengths)
    return [generate(pipeline, weights, prompt, **options)[0] for weights in made]
