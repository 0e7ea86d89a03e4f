"""Pretrained models: a folder or hub id -> module, parameters, config; and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from diffusion.pretrained import files, folders, hub, names, weights

CLASSES = {
    "AutoencoderKL": "autoencoder_kl",
    "UNet2DModel": "unet",
    "UNet2DConditionModel": "unet",
    "ControlNetModel": "controlnet",
    "T2IAdapter": "t2i_adapter",
    "DiTTransformer2DModel": "dit",
    "Transformer2DModel": "dit",
    "BertModel": "bert",
    "CLIPModel": "clip",
    "CLIPTextModel": "clip",
    "CLIPTextModelWithProjection": "clip",
    "CLIPVisionModelWithProjection": "clip",
    "Dinov2Model": "dinov2",
    "T5EncoderModel": "t5",
    "T5ForConditionalGeneration": "t5",
    "T5Model": "t5",
    "T5WithLMHeadModel": "t5",
}
"""Class in a config.json -> its file in ``networks``, which has ``from_config``, ``to_config``,
``names`` and ``example``."""
MODULES = {
    "AutoencoderKL": "autoencoder_kl",
    "UNet": "unet",
    "ControlNet": "controlnet",
    "T2IAdapter": "t2i_adapter",
    "DiT": "dit",
    "Bert": "bert",
    "ClipPair": "clip",
    "ClipText": "clip",
    "ClipVision": "clip",
    "DinoV2": "dinov2",
    "T5Encoder": "t5",
}
"""Our class -> its file in ``networks``."""


class Loaded(NamedTuple):
    """A model ready for use: ``module.apply({"params": params}, ...)``."""

    module: nn.Module
    params: dict
    config: dict[str, Any]


@dataclass(frozen=True)
class Model:
    """A model in a folder, whose weights are not read yet.

    Attributes:
      module: the network.
      config: its config.json.
      names: the name table of its weights.
      tensors: its weights; None if it was opened without them.
      source: its place, for messages.
    """

    module: nn.Module
    config: dict[str, Any]
    names: names.Names
    tensors: files.Tensors | None
    source: str

    @cached_property
    def shapes(self) -> dict:
        """Shapes of the parameters, as ``jax.ShapeDtypeStruct``s; nothing is computed."""
        try:
            return shapes(self.module)
        except Exception as error:  # the libraries below raise errors of many kinds
            raise ValueError(
                f"{self.source}: no network can be built with the fields of its config: {error}"
            ) from error

    def nbytes(self, dtype: DTypeLike = jnp.float32) -> int:
        """Bytes of the parameters in a dtype."""
        return weights.nbytes(self.shapes, dtype)

    def check(self) -> None:
        """Raises ValueError unless the weights are exactly this model's."""
        stored = names.canonical(self.names, self.tensors)
        found = {key: self.tensors[name].shape for key, name in stored.items()}
        names.check(names.bind(self.names, self.shapes), found, self.source)

    def load(
        self,
        *,
        dtype: DTypeLike | None = jnp.float32,
        device: weights.Place | Callable[[tuple[int, ...]], weights.Place] | None = None,
    ) -> dict:
        """The parameters, on the device: see ``weights.load_params``."""
        return weights.load_params(
            self.names, self.shapes, self.tensors, dtype=dtype, device=device, what=self.source
        )


def shapes(module: nn.Module) -> dict:
    """The parameters of a module, as ``jax.ShapeDtypeStruct``s; nothing is computed."""
    return jax.eval_shape(module.init, jax.random.key(0), *example(module))["params"]


def example(module: nn.Module) -> tuple:
    """Arguments of ``module.init``, by shape, with a batch of 1."""
    return _file(module).example(module)


def class_name(config: Mapping[str, Any], source: str = "config.json") -> str:
    """The class of a config.json: diffusers' ``_class_name`` or transformers' ``architectures``."""
    listed = config.get("architectures")
    name = config.get("_class_name") or (listed[0] if isinstance(listed, list) and listed else None)
    if not isinstance(name, str):
        raise ValueError(f"{source} names no class, in _class_name or architectures")
    if name not in CLASSES:
        near = folders.nearest(name, CLASSES)
        raise ValueError(f"{source}: {name} is not supported{near}; legal: {', '.join(CLASSES)}")
    return name


def from_config(config: Mapping[str, Any], source: str = "config.json") -> nn.Module:
    """The module of a config.json, of any class in ``CLASSES``.

    Raises:
      ValueError: for an unsupported class or value, or an unknown field.
    """
    file = _import(CLASSES[class_name(config, source)])
    try:
        return file.from_config(config)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    except (TypeError, ArithmeticError, LookupError, AttributeError) as error:
        raise ValueError(f"{source}: its fields do not describe a network: {error}") from error


def open_model(
    path_or_id: str | Path,
    subfolder: str | None = None,
    *,
    variant: str | None = None,
    revision: str | None = None,
    expected: str | None = None,
    with_weights: bool = True,
) -> Model:
    """Finds a model and checks its files, without reading its weights.

    Args:
      path_or_id: a model's folder, or an id on the Hugging Face hub.
      subfolder: of a pipeline's folder, e.g. 'unet'.
      variant: of the weights, e.g. 'fp16'.
      revision: a branch, tag or commit on the hub.
      expected: the class that it must have, e.g. 'UNet2DConditionModel'.
      with_weights: if False, only config.json is needed (and fetched).

    Raises:
      FileNotFoundError: there is no such folder, or a file is missing.
      ValueError: another class than expected; a field of config.json, or a file, that cannot be
        read; weights that are not this model's.
    """
    options = {"variant": variant, "revision": revision, "weights": with_weights}
    folder = hub.locate(path_or_id, subfolder, **options)
    path = folder / "config.json"
    if not path.is_file() and (folder / "model_index.json").is_file():
        parts = sorted(part.name for part in folder.iterdir() if (part / "config.json").is_file())
        raise ValueError(f"{folder} holds a pipeline; give a subfolder: {', '.join(parts)}")
    config = folders.read_json(path)
    name = class_name(config, str(path))
    if expected is not None and name != expected:
        raise ValueError(f"{folder} holds a model of class {name}; expected {expected}")
    module = from_config(config, str(path))
    tensors = folders.open_folder(folder, variant) if with_weights else None
    model = Model(module, config, table(module), tensors, str(folder))
    if with_weights:
        model.check()
    return model


def load(
    path_or_id: str | Path,
    subfolder: str | None = None,
    *,
    variant: str | None = None,
    revision: str | None = None,
    expected: str | None = None,
    dtype: DTypeLike | None = jnp.float32,
    device: weights.Place | Callable[[tuple[int, ...]], weights.Place] | None = None,
) -> Loaded:
    """A pretrained model: ``module, params, config = load('models/sd15', 'unet')``.

    Args and errors: see ``open_model`` and ``weights.load_params``.
    """
    model = open_model(path_or_id, subfolder, variant=variant, revision=revision, expected=expected)
    return Loaded(model.module, model.load(dtype=dtype, device=device), model.config)


def save(
    folder: str | Path,
    module: nn.Module,
    params: Mapping[str, Any],
    *,
    config: Mapping[str, Any] | None = None,
    dtype: DTypeLike | None = None,
    variant: str | None = None,
    max_shard_bytes: float = 10e9,
) -> None:
    """Writes a folder from which diffusers or transformers, and ``load``, make the same model.

    Args:
      folder: new, empty, or a model's, which is then replaced.
      module, params: the network.
      config: a config.json of this network, written unchanged, such as the loaded one; by default
        a new one is made.
      dtype: of the weights in the file; by default the parameters' own.
      variant: another name for the weights, e.g. 'fp16'.
      max_shard_bytes: larger weights are split over several files.

    Raises:
      ValueError: the folder holds other things, the parameters are not the module's, the config
        describes another network, or these libraries do not have the network.
    """
    file = _file(module)
    own = file.to_config(module)
    other = own if config is None else file.to_config(file.from_config(config))
    differing = [key for key in own if own[key] != other.get(key)]
    if differing:
        raise ValueError(f"config describes another network; it differs in {', '.join(differing)}")
    tensors = weights.save_params(table(module), params, dtype=dtype)
    expected = names.bind(table(module), shapes(module))
    names.check(expected, {key: tensor.shape for key, tensor in tensors.items()}, "params")
    config = dict(own if config is None else config)
    base = folders.DIFFUSERS if "_class_name" in config else folders.TRANSFORMERS
    folders.write_folder(folder, base, tensors, max_shard_bytes=max_shard_bytes, variant=variant)
    folders.write_json(Path(folder) / "config.json", config)


def table(module: nn.Module) -> names.Names:
    """The name table of a module's weights."""
    return _file(module).names(module)


def to_config(module: nn.Module) -> dict[str, Any]:
    """The config.json from which diffusers or transformers makes the same network."""
    return _file(module).to_config(module)


def _file(module: nn.Module) -> ModuleType:
    name = type(module).__name__
    if name not in MODULES:
        raise ValueError(f"{name} has no pretrained format; these have: {', '.join(MODULES)}")
    return _import(MODULES[name])


def _import(name: str) -> ModuleType:
    # Only when needed: a network's file imports the network's code.
    return import_module(f"diffusion.pretrained.networks.{name}")
