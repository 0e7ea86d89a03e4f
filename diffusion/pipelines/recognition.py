"""Which family a few-step checkpoint is of, by its name, by its files or by what a user says."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusion import specs
from diffusion.errors import field
from diffusion.pipelines.few_step_families import CHOICES, CM, LCM, TCD
from diffusion.pipelines.from_pretrained import Opened
from diffusion.pipelines.pipeline import Defaults, Pipeline
from diffusion.pretrained.schedulers.scheduler import PREDICTIONS

AUTO = "auto"
NAMES = (
    (r"sdxl_lightning_(\d)step.*", "lightning(steps={})"),
    (r"hyper-sd(?:xl|15)-(\d+)steps?-cfg-lora.*", "hyper_cfg(steps={})"),
    (r"hyper-sd(?:xl|15)-1step-lora.*", "hyper_unified()"),
    (r"hyper-sd(?:xl|15)-(\d+)steps?-lora.*", "hyper(steps={})"),
    (r"hyper-sdxl-1step-unet.*", "hyper_unet()"),
    (r"dmd2_sdxl_(\d)step.*", "dmd2(steps={})"),
    (r"lcm-lora-(?:sdv1-5|sdxl|ssd-1b).*", "lcm_lora()"),
    (r"tcd-sd.*-lora", "tcd()"),
    (r"flash-?(?:sd|sdxl)", "flash()"),
    (r"sd(?:_?xl)?[-_]turbo(?:_1\.0)?(?:_fp16)?", "turbo()"),
    (r"(?:diffusers-)?cd_imagenet64(?:_.*)?", "consistency(second=22)"),
    (r"(?:diffusers-)?ct_imagenet64", "consistency(second=106)"),
    (r"(?:diffusers-)?cd_(?:bedroom|cat)256_lpips", "consistency(second=17)"),
    (r"(?:diffusers-)?cd_(?:bedroom|cat)256_l2", "consistency(second=18)"),
    (r"(?:diffusers-)?ct_bedroom256", "consistency(second=67)"),
    (r"(?:diffusers-)?ct_cat256", "consistency(second=62)"),
)
"""The names of published files and repositories -> their families."""
UNNAMED = ("pytorch_lora_weights", "adapter_model", "diffusion_pytorch_model")
"""Names of files that are called by the folder that they lie in."""


def chosen(opened: Opened, family: str, names: Sequence[str] = (), at: str = "family") -> Opened:
    """A model with the settings of its family.

    Args:
      opened: the model.
      family: a spec of ``CHOICES``; "auto": what its files say, if anything; "": none.
      names: of the files that it is made of; those that were added last come first.
      at: what errors call ``family``.

    Raises:
      ValueError: there is no such family, or the model cannot be of it.
    """
    if not family:
        return opened
    pipeline, (shown, file) = opened.pipeline, by_name(names)
    if family == AUTO:
        text = shown or by_config(pipeline)
        if text == "turbo()" and _trailing(pipeline) == "EulerDiscreteScheduler":
            text = "turbo(ancestral=False)"
        return replace(opened, pipeline=_given(pipeline, text, at)) if text else opened
    made = _given(pipeline, family, at)
    if shown:
        other = specs.value(shown, CHOICES, at)
        same = family.partition("(")[0].strip() == shown.partition("(")[0]
        if not same or other.steps != made.few_steps.steps:
            raise ValueError(f"{at}={family!r}: {file} is of {shown}, as its name says")
    return replace(opened, pipeline=made)


def by_name(names: Sequence[str]) -> tuple[str, str]:
    """(spec of the family that the first known name says, that name); empty for none."""
    for given in filter(None, names):
        path = Path(given)
        name = path.name.removesuffix(".safetensors")
        name = path.parent.name if name in UNNAMED else name
        for pattern, spec in NAMES:
            if found := re.fullmatch(pattern, name, re.IGNORECASE):
                return spec.format(*found.groups()), given
    return "", ""


def by_config(pipeline: Pipeline) -> str:
    """The spec of the family that the network's or the scheduler's config says; empty for none."""
    if pipeline.takes_scale:
        return "lcm()"
    if _trailing(pipeline) == "EulerAncestralDiscreteScheduler":
        return "turbo()"
    kinds = {LCM: "lcm_lora()", TCD: "tcd()", CM: "consistency()"}
    return kinds.get((pipeline.scheduler or {}).get("_class_name"), "")


def _given(pipeline: Pipeline, text: str, at: str) -> Pipeline:
    """The pipeline with solver, steps and guidance of a family, and what its network predicts."""
    with field(f"{at}={text!r}"):
        made = specs.value(text, CHOICES, at)._replace(name=text)
        if not pipeline.kind.startswith(made.base):
            raise ValueError(f"it is for {made.base}Pipeline, and this is {pipeline.kind}")
        if made.embedded and not pipeline.takes_scale:
            raise ValueError(
                "it is for networks that take guidance's scale (time_cond_proj_dim), which this "
                "one does not; LoRAs are of lcm_lora"
            )
    options: dict[str, Any] = {}
    if made.prediction:
        options["scheduler"] = {**pipeline.scheduler, "prediction_type": made.prediction}
        options["prediction"] = PREDICTIONS[made.prediction]
    if made.side:
        most = made.side // pipeline.codec.factor
        sides = (min(side, most) for side in pipeline.shape[:-1])
        options["shape"] = (*sides, pipeline.shape[-1])
    # A network that edits pictures is guided in its own way.
    guidance = pipeline.defaults.guidance if pipeline.edits else (f"cfg({made.scale:g})",)
    defaults = Defaults(made.solver, "uniform", made.usual, guidance)
    return replace(pipeline, defaults=defaults, few_steps=made, **options)


def _trailing(pipeline: Pipeline) -> str:
    """The class of a scheduler whose config says "trailing"; empty for others."""
    scheduler = pipeline.scheduler or {}
    trailing = scheduler.get("timestep_spacing") == "trailing"
    return scheduler.get("_class_name", "") if trailing else ""
