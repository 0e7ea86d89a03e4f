"""--mode=inspect: a contact sheet and statistics of the data, before training."""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from diffusion.config import data, ranges
from diffusion.data import batches as pipeline
from diffusion.data import inspection
from diffusion.data.inspection import Look, Moments
from diffusion.data.sources import Source, subset
from diffusion.errors import field
from diffusion.evaluation import contact_sheet, figures
from diffusion.evaluation.views import VIEWS
from diffusion.pipelines.description import tokenizer

SPLITS = ("train", "test")
COLOURS = {1: ("#1f2430",), 3: ("#dc2626", "#16a34a", "#2563eb")}
BATCHES = 20  # that statistics of pixels are taken over, at least
SECONDS = 5.0  # at most, in which the speed is measured
FAR = 1.2  # a factor that data.std may be off by
LISTED = 10  # damaged images that are printed


def run(config: ConfigDict, workdir: str) -> None:
    """Leaves inspect.png and inspect.json in ``workdir``, and prints the main figures.

    Every image is read and decoded once. The sheet, the statistics of pixels and the speed are of
    the batches that training gets. Damaged images are named, and left out of all that.
    """
    ranges.check(config)
    config, folder = config.copy_and_resolve_references(), Path(workdir)
    c = config.data
    size = config.train.batch_size
    skip, c.on_error = c.on_error == "skip", "raise"  # all are looked at here anyway
    stored, looks, damaged = _look(c)
    train, test = (data.finished(c, stored[split], split) for split in SPLITS)
    report: dict[str, Any] = {
        "name": train.name,
        "examples": {split: len(source) for split, source in stored.items()},
        "shape": list(train.shape),
        "damaged": damaged,
    }
    if any(looks.values()):
        every = [look for split in SPLITS for look in looks[split]]
        report["sizes"] = inspection.sizes(every, train.shape[:2])
        report["modes"] = dict(Counter(look.mode for look in every).most_common())
    report["duplicates"] = inspection.duplicates(
        {s: [k.digest for k in looks[s]] or inspection.digests(stored[s]) for s in SPLITS},
        {s: _namer(stored[s], s) for s in SPLITS},
    )
    label = _labels(stored["train"])
    if label is not None and stored["train"].num_classes:
        known = stored["train"]
        report["classes"] = inspection.classes(label, known.class_names, known.num_classes)
    if train.captions:
        report["captions"] = _captions(c, train, test)
    if train.buckets:
        report["buckets"] = {
            f"{part.shape[1]} x {part.shape[0]}": {
                "examples": len(part),
                "batches_per_epoch": round(len(part) / size, 3),
            }
            for part in train.buckets
        }
    seen, moments = _batches(config, train)
    report["pixels"] = moments.result()
    with field("config.data.cache"):
        report["trained_on"] = _trained_on(config, report["pixels"])
    report["images_per_second"] = _speed(config, train)
    report["notes"] = _notes(config, report, skip)
    folder.mkdir(parents=True, exist_ok=True)
    figures.save_png(folder / "inspect.png", _sheet(config, train, test, report, seen, moments))
    (folder / "inspect.json").write_text(json.dumps(report, indent=2) + "\n")
    print(summary(report))
    print(f"{folder / 'inspect.png'} shows them, inspect.json has all numbers")


def summary(report: dict[str, Any]) -> str:
    """The main figures, one thing a line."""
    examples = report["examples"]
    lines = [
        f"{report['name']}: {examples['train']:,} training and {examples['test']:,} held-out "
        f"examples, {_shape(report['shape'])}"
    ]
    if sizes := report.get("sizes"):
        most = ", ".join(f"{k} ({v:,})" for k, v in list(sizes["most_common"].items())[:3])
        lines.append(
            f"sizes: {sizes['different']} different, most often {most}; "
            f"{sizes['enlarged']:.1%} are smaller than they are trained at"
        )
        lines.append("modes: " + ", ".join(f"{k} ({v:,})" for k, v in report["modes"].items()))
    if classes := report.get("classes"):
        lines.append(
            f"classes: {classes['count']}, of {classes['smallest']:,} to "
            f"{classes['largest']:,} examples"
        )
    if captions := report.get("captions"):
        words = captions["words"]
        line = f"captions: {captions['different']:,} different, {words['min']} to {words['max']}"
        line += f" words (median {words['median']:g})"
        if "tokens" in captions:
            tokens = captions["tokens"]
            line += (
                f"; {tokens['min']} to {tokens['max']} tokens (median {tokens['median']:g}), "
                f"{captions['cut']:.1%} cut at {captions['longest_allowed']}; "
                f"{captions['unknown']:.2%} of the held-out tokens unknown"
            )
        lines.append(line)
    if buckets := report.get("buckets"):
        lines.append(
            "buckets: " + ", ".join(f"{k} ({v['examples']:,})" for k, v in buckets.items())
        )
    pixels = report["pixels"]
    lines.append(f"mean {pixels['mean']}, standard deviation {pixels['std']} in [-1, 1]")
    if trained_on := report["trained_on"]:
        lines.append(f"latents: mean {trained_on['mean']}, standard deviation {trained_on['std']}")
    lines.append(f"{report['images_per_second']:,.0f} images/s, by the pipeline alone")
    return "\n".join(lines + [f"note: {note}" for note in report["notes"]])


def _look(
    c: ConfigDict,
) -> tuple[dict[str, Source], dict[str, list[Look]], dict[str, dict[str, str]]]:
    """What is stored, what it looks like, and what is damaged, which the former two are without."""
    stored, looks, damaged = {}, {}, {}
    for split in SPLITS:
        source = data.stored(c, split)
        found: list[Look] = []
        if source.pictures is not None:
            found = inspection.look(source.pictures, progress=sys.stderr.isatty())
            name = source.pictures.name
            bad = {name(i): look.damage for i, look in enumerate(found) if look.damage}
            damaged[split] = bad
            if len(bad) == len(found):
                raise ValueError(f"none of the {len(bad)} images of {split} can be decoded")
            if bad:
                keep = [i for i, look in enumerate(found) if not look.damage]
                source, found = subset(source, np.array(keep)), [found[i] for i in keep]
        stored[split], looks[split] = source, found
    return stored, looks, damaged


def _namer(source: Source, split: str) -> Callable[[int], str]:
    return source.pictures.name if source.pictures else lambda i: f"{split}, example {i}"


def _labels(source: Source) -> np.ndarray | None:
    if not source.num_classes:
        return None
    every = np.arange(len(source))
    if source.pictures is not None:
        return np.asarray(source.pictures.columns["label"][every])
    blocks = np.array_split(every, max(1, len(every) // inspection.BLOCK))
    return np.concatenate([source.read(block)["label"] for block in blocks])


def _captions(c: ConfigDict, train: Source, test: Source) -> dict[str, Any]:
    report = inspection.captions(train.captions)
    if c.tokenizer:
        report |= inspection.tokens(tokenizer(c.tokenizer), train.captions, c.tokens)
        if train.vocabulary and test.captions:  # 0 stands for what training does not know
            ids = test.encode(test.captions)
            report["unknown"] = float(np.mean(ids["tokens"][ids["context_mask"]] == 0))
    return report


def _batches(config: ConfigDict, train: Source) -> tuple[list[tuple[np.ndarray, str]], Moments]:
    """The first pictures that training sees, with what they are of, and statistics of pixels."""
    batch_size, count = config.train.batch_size, config.inspect.count
    with field("config.data"):
        batch_at = pipeline.batch_function(
            train, batch_size, config.seed, augmentation=data.augmentation(config.data)
        )
    seen, moments = [], Moments()
    whole = sum(map(len, train.buckets)) or len(train)
    steps = max(-(-count // batch_size), min(BATCHES, -(-whole // batch_size)))
    for step, batch in enumerate(itertools.islice(data.batches(config, train, 0), steps)):
        moments.add(batch)
        if len(seen) < count:
            source, index = batch_at.examples(step)
            for x, i in zip(np.asarray(batch["x"], np.float32), index[: count - len(seen)]):
                label = int(batch["label"][len(seen) % batch_size]) if "label" in batch else None
                seen.append((x, _text(source, int(i), label)))
    return seen, moments


def _text(source: Source, i: int, label: int | None) -> str:
    if source.captions:
        return source.captions[i]
    if label is not None:
        return source.class_names[label] if source.class_names else str(label)
    return ""


def _trained_on(config: ConfigDict, pixels: dict[str, Any]) -> dict[str, Any] | None:
    """Statistics of the cached latents, if that is what training sees."""
    if not config.data.autoencoder:
        return None
    try:
        source = data.make_source(config.data, "train")
    except FileNotFoundError:
        return None
    return _batches(config, source)[1].result()


def _speed(config: ConfigDict, train: Source) -> float:
    batches = data.batches(config, train, 0)
    next(batches)  # the first waits for processes to start
    began, count = time.perf_counter(), 0
    while (seconds := time.perf_counter() - began) < SECONDS and count < 200:
        next(batches)
        count += 1
    return count * config.train.batch_size / seconds


def _notes(config: ConfigDict, report: dict[str, Any], skip: bool) -> list[str]:
    """What a user may want to change."""
    c, notes = config.data, []
    for split, bad in report["damaged"].items():
        what = "left out" if skip else "training stops at the first (config.data.on_error=raise)"
        for name, cause in list(bad.items())[:LISTED]:
            notes.append(f"{name}: {cause}")
        if bad:
            notes.append(f"{split}: {len(bad)} cannot be decoded; {what}")
    std = (report["trained_on"] or report["pixels"])["std_of_all"]
    if std and not 1 / FAR < c.std / std < FAR:
        notes.append(
            f"config.data.std={c.std:g}, and the standard deviation is {std:g}: where the "
            f"prediction or the weighting is EDM's, --config.data.std={std:.2g}"
        )
    if c.autoencoder and report["trained_on"] is None:
        notes.append("no latents yet, so no statistics of them: --mode=cache computes them")
    if twice := report["duplicates"]["groups"]:
        between = report["duplicates"]["groups_between_splits"]
        notes.append(
            f"{twice:,} images occur several times"
            + (f", {between:,} of them in both splits" if between else "")
            + f", as {' and '.join(map(str, report['duplicates']['first'][0]))}"
        )
    if report.get("classes", {}).get("empty"):
        notes.append(f"{report['classes']['empty']} classes have no training examples")
    if (cut := report.get("captions", {}).get("cut", 0)) > 0.01:
        notes.append(f"{cut:.1%} of the captions are cut: raise config.data.tokens={c.tokens}")
    few = [k for k, v in report.get("buckets", {}).items() if v["batches_per_epoch"] < 1]
    if few:
        notes.append(
            f"buckets of fewer examples than a batch: {', '.join(few)}; one of them sees an "
            "example several times in a batch, and a batch less than once an epoch"
        )
    return notes


def _sheet(
    config: ConfigDict,
    train: Source,
    test: Source,
    report: dict[str, Any],
    seen: list[tuple[np.ndarray, str]],
    moments: Moments,
) -> np.ndarray:
    c, shape = config.data, train.shape
    done = [f"{c.crop} crop"] if train.crop is not None else []
    done += ["mirrored at random"] if c.flip else []
    shapes = ", ".join(report.get("buckets", {})) or _shape(shape)
    subtitle = f"The first {len(seen)} that training sees: {'; '.join([shapes, *done])}"
    plots = []
    view = VIEWS[train.view]
    pictures, texts = view.thumbnails([x for x, _ in seen]), [text for _, text in seen]
    if pictures:
        channels = COLOURS.get(shape[-1], COLOURS[3] + ("#9ca3af",) * max(0, shape[-1] - 3))
        plots.append(
            contact_sheet.histogram("values of pixels", Moments.EDGES, moments.histogram, channels)
        )
    else:
        plots.append(view.diagram(test.all()["x"]))
        texts, subtitle = [], f"{len(test):,} held-out {train.view}"
    if classes := report.get("classes"):
        order = sorted(classes["examples"].items(), key=lambda item: -item[1])
        plots.append(contact_sheet.bars("examples of each class", *zip(*order)))
    if captions := report.get("captions"):
        words = np.array([len(text.split()) for text in train.captions])
        title = "words of captions"
        if "cut" in captions:
            title += f" ({captions['cut']:.1%} cut at {captions['longest_allowed']} tokens)"
        plots.append(contact_sheet.columns(title, words))
    if buckets := report.get("buckets"):
        counts = [bucket["examples"] for bucket in buckets.values()]
        plots.append(contact_sheet.bars("images of each bucket", list(buckets), counts))
    elif sizes := report.get("sizes"):
        most = sizes["most_common"]
        plots.append(contact_sheet.bars("original sizes", list(most), list(most.values()), 8))
    examples = report["examples"]
    return contact_sheet.contact_sheet(
        pictures,
        texts,
        title=f"{train.name}: {examples['train']:,} + {examples['test']:,} held out",
        subtitle=subtitle,
        columns=config.inspect.columns,
        plots=plots,
    )


def _shape(shape: list[int] | tuple[int, ...]) -> str:
    *sides, channels = shape
    if not sides:
        return f"{channels} numbers"
    size = " x ".join(str(side) for side in reversed(sides))
    return f"{size}, {channels} channel{'s' if channels > 1 else ''}"
