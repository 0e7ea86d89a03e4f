"""Results of adapter_demonstrations.py: kept by demonstration and seed, as a table and pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from benchmarks.adapter_judges import summary

SCALE, LABEL, GAP = 2, 84, 6


class Row(NamedTuple):
    """A row of the table.

    Attributes:
      name: of the demonstration.
      key: of the figure.
      text: what the figure is.
      proposed: the threshold that was proposed before anything was tried.
      control: keys of what it is compared with, and what these are.
    """

    name: str
    key: str
    text: str
    proposed: str
    control: tuple[tuple[str, str], ...] = ()


ROWS = (
    Row("lora", "styled_1", "in the style, strength 1", "at least 0.9",
        (("styled_0.5", "strength 0.5"), ("judge", "real ones in the style"))),
    Row("lora", "styled_0", "in the style, strength 0", "at most 0.05",
        (("judge_plain", "real ones"),)),
    Row("lora", "among_10_kept", "own caption among 10 of 196, strength 1", "0.8 of the base's",
        (("among_10_base", "base"), ("among_10_base_styled", "base, styled by the formula"))),
    Row("dreambooth", "subject_prior", "nearest of 196 is the subject", "at least 0.5",
        (("subject_base", "base"), ("subject_alone", "without prior"))),
    Row("dreambooth", "class_prior", "likewise, prompt of the class alone", "at most 0.05",
        (("class_base", "base"), ("class_alone", "without prior"))),
    Row("textual_inversion", "word", "nearest of 196 is the subject", "at least 0.1",
        (("initial", "initial word"),)),
    Row("textual_inversion", "word_rank", "rank of the subject", "below the initial word's",
        (("initial_rank", "initial word"),)),
    Row("controlnet", "exact_1", "F1 of edges to the pixel, scale 1", "",
        (("exact_0.5", "scale 0.5"), ("exact_0", "scale 0"), ("exact_shuffled", "others' edges"),
         ("exact_autoencoder", "the pictures, autoencoded"))),
    Row("controlnet", "f1_1", "likewise within 1 pixel", "at least 0.6",
        (("f1_0.5", "scale 0.5"), ("f1_0", "scale 0"), ("f1_shuffled", "others' edges"),
         ("f1_autoencoder", "the pictures, autoencoded"))),
    Row("ip_adapter", "first", "nearest of 196 is the own reference", "at least 0.2",
        (("first_permuted", "others' references"), ("first_autoencoder", "autoencoded"))),
    Row("ip_adapter", "rank", "rank of the own reference", "",
        (("rank_permuted", "others' references"),)),
    Row("instruct_pix2pix", "recognised", "the edit asked for is the nearest of 5",
        "at least 0.8", (("recognised_colour", "colours alone"),
         ("recognised_turned", "turned alone"), ("recognised_untold", "no instruction"))),
    Row("instruct_pix2pix", "structure_2.5", "correlation with the given, image guidance 2.5",
        "above that of less", (("structure_1.5", "1.5"), ("structure_1", "1"))),
    *(
        Row("stacked", f"{key}_without_none", text, "",
            tuple((f"{key}_without_{off}", f"without {name}") for off, name in others))
        for key, text, others in (
            ("styled", "in the style", (("lora", "LoRA"),)),
            ("exact", "F1 of edges to the pixel", (("control", "ControlNet"),)),
            ("rank", "rank of the reference", (("image", "IP-Adapter"),)),
            ("word_rank", "rank of the word's subject", (("word", "the word"),)),
        )
    ),
)  # fmt: skip


class Results:
    """``results.json``, ``results.md``, a PNG per demonstration and seed, ``adapters.png``."""

    def __init__(self, folder: Path):
        self._folder, self._file = folder, folder / "results.json"
        self._kept = json.loads(self._file.read_text()) if self._file.exists() else {}

    def has(self, name: str, seed: int) -> bool:
        """Whether a demonstration is there."""
        return str(seed) in self._kept.get(name, {})

    def add(
        self,
        name: str,
        seed: int,
        figures: Mapping[str, float],
        shown: Sequence[tuple[str, np.ndarray]],
    ) -> None:
        """Keeps a demonstration."""
        self._kept.setdefault(name, {})[str(seed)] = dict(figures)
        self._file.write_text(json.dumps(self._kept, indent=1) + "\n")
        (self._folder / "results.md").write_text(self.table())
        strip(name, shown).save(self._folder / f"{name}_{seed}.png")
        save_strips(self._folder)

    def table(self) -> str:
        """As markdown: means and ranges over the seeds."""
        lines = [
            "| demonstration | figure | here | proposed | beside it | seconds |",
            "|---|---|---|---|---|---|",
        ]
        named = ""
        for row in ROWS:
            runs = self._kept.get(row.name, {}).values()
            if not runs:
                continue
            beside = ", ".join(
                f"{text}: {summary([run[key] for run in runs])}"
                for key, text in row.control
                if all(key in run for run in runs)
            )
            seconds = summary([run["seconds"] for run in runs]) if row.name != named else ""
            shown = row.name.replace("_", " ") if row.name != named else ""
            value, named = summary([run[row.key] for run in runs]), row.name
            lines.append(
                f"| {shown} | {row.text} | {value} | {row.proposed} | {beside} | {seconds} |"
            )
        return "\n".join(lines) + "\n"


def strip(name: str, shown: Sequence[tuple[str, np.ndarray]]) -> Image.Image:
    """A headline, and rows of pictures [N, H, W, 3] with their labels in front."""
    count, side = len(shown[0][1]), shown[0][1].shape[1] * SCALE
    made = Image.new("RGB", (LABEL + count * side, 18 + len(shown) * (side + 2)), "white")
    pen, font = ImageDraw.Draw(made), ImageFont.load_default(11)
    pen.text((0, 2), name.replace("_", " "), fill="black", font=ImageFont.load_default(13))
    for i, (label, images) in enumerate(shown):
        top = 18 + i * (side + 2)
        pen.text((0, top + side // 2 - 6), label, fill="#444444", font=font)
        for j, image in enumerate(images):
            tile = Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST)
            made.paste(tile, (LABEL + j * side, top))
    return made


def save_strips(folder: Path) -> None:
    """``adapters.png``: the first seed's pictures in two columns, in 128 colours."""
    names = list(dict.fromkeys(row.name for row in ROWS))
    files = [folder / f"{name}_0.png" for name in names]
    strips = [Image.open(file).convert("RGB") for file in files if file.exists()]
    if not strips:
        return
    columns: tuple[list[Image.Image], list[Image.Image]] = ([], [])
    for one in strips:
        shorter = min(columns, key=lambda column: sum(x.height + GAP for x in column))
        shorter.append(one)
    width = max(one.width for one in strips)
    height = max(sum(one.height + GAP for one in column) for column in columns)
    made = Image.new("RGB", (2 * width + 4 * GAP, height), "white")
    for i, column in enumerate(columns):
        top = 0
        for one in column:
            made.paste(one, (i * (width + 4 * GAP), top))
            top += one.height + GAP
    made.quantize(128, dither=Image.Dither.NONE).save(folder / "adapters.png", optimize=True)
