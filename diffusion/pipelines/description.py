"""What a run's model is, as data: the ``model.json`` that makes a workdir a pipeline.

A config and its data become a ``Description``, and that becomes the pipeline, in training as well
as later, when neither config nor data are needed. It is written before the first step.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from diffusion import denoiser, pretrained, schedules, specs
from diffusion import predictions as predictions_lib
from diffusion.data import tokens
from diffusion.errors import field, wrong_types
from diffusion.evaluation.views import VIEWS
from diffusion.models.autoencoder import AutoencoderKL
from diffusion.models.clip import ClipText
from diffusion.models.dit import DiT
from diffusion.models.mlp import MLP
from diffusion.models.noisy_classifier import NoisyClassifier
from diffusion.models.text_to_image import TextToImage
from diffusion.models.unet import UNet
from diffusion.objectives.classification import Classification
from diffusion.pipelines.codec import KL, Codec
from diffusion.pipelines.conditioners import (
    Captions,
    Conditioner,
    FrozenEncoder,
    Labels,
)
from diffusion.pipelines.pipeline import DEFAULTS, Defaults, Pipeline
from diffusion.pipelines.tokenizers import clip_tokenizer, load_tokenizer
from diffusion.pretrained import folders, hub
from diffusion.runs.workdir import tuples
from diffusion.schedules import Schedule

FILE = "model.json"
FORMAT = 1
TOKENIZER = "tokenizer"
DENOISERS = ("unet", "dit", "mlp", "pretrained")
DRAWN = (*DENOISERS, "adapted")
NETWORKS = {"unet": UNet, "dit": DiT, "mlp": MLP, "classifier": NoisyClassifier}
NETWORKS |= {"autoencoder": AutoencoderKL}
DAMAGED = (KeyError, TypeError, AttributeError)
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Description:
    """A model, in words and numbers that JSON knows.

    Attributes:
      network: the name of one of ``NETWORKS``, "pretrained", or "adapted".
      fields: of the network; of a pretrained one, {"path": a pipeline's folder or hub id}; of an
        adapted one also "adapter", a spec, and "base", the fingerprint of what lies at that path.
      schedule, prediction, c_noise: specs.
      shape: of one example as the network sees it.
      dtype: of the computation.
      sigma_data: standard deviation of the data, for the prediction "edm".
      learned_variance: whether the network has a second output, the variances.
      two_times: whether the network is told where it aims.
      view: a name of ``VIEWS``.
      num_classes, class_names: of labels that the network is given; 0 if it is given none.
      null: whether it was also trained without labels or captions.
      tokenizer: folder of the captions' tokenizer; empty without captions.
      tokens: of the longest caption.
      vocabulary: ids of the tokens that the network's own text encoder knows.
      text: fields of that encoder; empty: there is none.
      text_encoder: folder of a frozen encoder of captions.
      autoencoder: folder of the autoencoder whose latents the network sees; empty: none.
      captions: some held-out ones, which are drawn by default.
      edits: whether it edits a picture as a caption says.
      sampler: solver, grid, steps and guidance.
    """

    network: str
    fields: Mapping[str, Any]
    schedule: str
    prediction: str
    c_noise: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    sigma_data: float = 0.5
    learned_variance: bool = False
    two_times: bool = False
    view: str = "images"
    num_classes: int = 0
    class_names: tuple[str, ...] = ()
    null: bool = True
    tokenizer: str = ""
    tokens: int = 0
    vocabulary: tuple[int, ...] = ()
    text: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    text_encoder: str = ""
    autoencoder: str = ""
    captions: tuple[str, ...] = ()
    edits: bool = False
    sampler: Defaults = DEFAULTS


def write(folder: str | Path, description: Description) -> None:
    """Writes ``folder/model.json``, and the captions' tokenizer beside it."""
    content = {"format": FORMAT} | dataclasses.asdict(description)
    content["sampler"] = description.sampler._asdict()
    path = Path(folder) / FILE
    if description.tokenizer:
        tokenizer(description.tokenizer).save_pretrained(path.with_name(TOKENIZER))
        content["tokenizer"] = TOKENIZER
    partial_path = path.with_suffix(".partial")
    partial_path.write_text(json.dumps(content, indent=2) + "\n")
    partial_path.replace(path)


def read(folder: str | Path) -> Description:
    """The description in ``folder/model.json``.

    An autoencoder that was moved away is also found as ``folder/autoencoder``.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is damaged, or of another version of this project.
    """
    path = Path(folder) / FILE
    try:
        content = tuples(folders.read_json(path))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: it does not describe a model ({error})") from error
    try:
        if content.pop("format") != FORMAT:
            raise ValueError(f"{path} is of another version of this project; expected {FORMAT}")
        content["sampler"] = Defaults(**content["sampler"])
        if content["tokenizer"]:
            content["tokenizer"] = str(path.with_name(content["tokenizer"]))
        if content["autoencoder"] and (own := path.with_name("autoencoder")).is_dir():
            content["autoencoder"] = str(own)
        d = Description(**content)
        known = {d.network: (*NETWORKS, *DRAWN), d.view: VIEWS, d.dtype: DTYPES}
        for name, names in known.items():
            if name not in names:
                raise KeyError(name)
        return dataclasses.replace(d, fields=dict(d.fields), text=dict(d.text))
    except DAMAGED as error:
        unknown = f" ({error})" if isinstance(error, KeyError) else ""
        raise ValueError(f"{path} is damaged: it does not describe a model{unknown}") from error


def schedule(d: Description, at: str = "") -> Schedule:
    """t -> NoiseLevel; ``at`` is what errors say before the field's name, "config.objective."."""
    with field(f"{at}schedule={d.schedule!r}"), wrong_types():
        return specs.value(d.schedule, schedules.CHOICES, f"{at}schedule")


def prediction(d: Description, at: str = "") -> predictions_lib.Prediction:
    """What the network's output means."""
    context = {"sigma_data": d.sigma_data, "schedule": schedule(d, at)}
    function = specs.function(d.prediction, predictions_lib.CHOICES, f"{at}prediction", context)
    return _called(function, context["schedule"], f"{at}prediction={d.prediction!r}")


def c_noise(d: Description, at: str = "") -> Callable:
    """What the network is given of the noise level; "auto" is as usual with the schedule."""
    text, levels = d.c_noise, schedule(d, at)
    table = isinstance(levels, schedules.Table)
    if text == "auto":
        of_sigma = isinstance(levels, (schedules.EDM, schedules.VE))
        text = "ddpm_index" if table else "log_sigma" if of_sigma else "thousand_t"
    context = {"steps": levels.steps} if table else {}
    function = specs.function(text, denoiser.C_NOISE, f"{at}c_noise", context)
    return _called(function, levels, f"{at}c_noise={text!r}")


def _called(function: Callable, levels: Schedule, name: str) -> Callable:
    """The function of a level, once it has checked its options in a call."""
    with field(name), wrong_types():
        function(levels(levels.t_max / 2))
    return function


def network(d: Description) -> nn.Module:
    """The linen module.

    Raises:
      ValueError: fields that do not fit together or to the shape.
    """
    if d.network == "pretrained":
        model = pretrained.open_model(d.fields["path"], "unet", with_weights=False)
        return model.module.clone(dtype=DTYPES[d.dtype], remat=d.fields.get("remat", False))
    kind, options = NETWORKS[d.network], dict(d.fields, dtype=DTYPES[d.dtype])
    if d.two_times:
        options["two_times"] = True
    if kind is MLP:
        net = MLP(**options, num_classes=d.num_classes or None)
    elif kind is DiT:
        net = DiT(**options, num_classes=d.num_classes, learned_variance=d.learned_variance)
    elif kind is AutoencoderKL:
        channels = {"in_channels": d.shape[-1], "out_channels": d.shape[-1]}
        net = AutoencoderKL(**options, **channels, sample_size=d.shape[0])
        net.check(d.shape[:2])
    elif kind is NoisyClassifier:
        net = NoisyClassifier(**options, classes=d.num_classes)
        net.check(d.shape[:2])
    else:
        channels = d.shape[-1] * (2 if d.learned_variance else 1)
        net = UNet(**options, num_classes=d.num_classes or None, out_channels=channels)
        net.check(d.shape[:2])
    if not d.text:
        return net
    hidden = 4 * d.text["width"]
    vocabulary = len(d.vocabulary) + 1
    text = ClipText(
        **d.text, hidden=hidden, vocab_size=vocabulary, length=d.tokens, dtype=DTYPES[d.dtype]
    )
    return TextToImage(text=text, image=net)


def conditioner(d: Description) -> Conditioner:
    """Of labels or captions."""
    if d.num_classes:
        return Labels(d.num_classes, d.class_names, d.null)
    if not d.tokenizer:
        return Conditioner()
    tokenize = tokens.tokenizer(tokenizer(d.tokenizer), d.tokens)
    encode = partial(tokens.compacted, tokenize, np.array(d.vocabulary, np.int32))
    if d.text_encoder:
        encode = partial(_embedded, FrozenEncoder(located(d.text_encoder)), tokenize)
    return Captions(encode, d.captions, d.null)


def codec(d: Description) -> Codec:
    """Of latents, or none."""
    if not d.autoencoder:
        return Codec()
    model = pretrained.open_model(
        located(d.autoencoder), expected="AutoencoderKL", with_weights=False
    )
    return KL(model.module)


def pipeline(d: Description, known: Conditioner | None = None, at: str = "") -> Pipeline:
    """All of it; ``known`` is the conditioner, where the data have one already."""
    return Pipeline(
        "run",
        network(d),
        schedule(d, at),
        prediction(d, at),
        c_noise(d, at),
        d.shape,
        codec(d),
        conditioner(d) if known is None else known,
        VIEWS[d.view],
        d.sampler,
        edits=d.edits,
    )


def tokenizer(path: str) -> Any:
    """CLIP's merges file, a folder here or one of a pipeline on the hub, as a tokenizer.

    Raises:
      FileNotFoundError, ValueError: there is none.
    """
    if Path(path).is_file():
        return clip_tokenizer(path)
    if path.endswith(".gz"):
        raise FileNotFoundError(
            f"there is no file {path!r}; CLIP's bpe_simple_vocab_16e6.txt.gz is in OpenAI's "
            "repository"
        )
    return load_tokenizer(located(path))


def classification(d: Description) -> Classification:
    """A classifier of noised examples."""
    return Classification(network(d), schedule(d), prediction(d), c_noise(d))


def located(path: str) -> Path:
    """A folder of this machine, or of a pipeline on the hub: "owner/name/vae".

    Raises ValueError where there is none.
    """
    if Path(path).is_dir():
        return Path(path)
    name, _, part = path.rpartition("/")
    if not name:
        raise ValueError(f"there is no folder {path!r}")
    try:
        return hub.locate(name, part)
    except FileNotFoundError as error:
        raise ValueError(str(error)) from error


def _embedded(encoder: FrozenEncoder, tokenize: Callable, captions: Sequence[str]) -> dict:
    return encoder(tokenize(captions)["tokens"])
