"""Demonstrations of adapters that see pictures, ControlNet, IP-Adapter and InstructPix2Pix; and of
four adapters at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks import adapter_judges as judges
from benchmarks.adapter_bench import SHOWN, STEPS, Bench, Found
from benchmarks.adapter_weights import style_run, subject, word_run
from diffusion import pipelines
from diffusion.pipelines import control, image_prompts, samplers
from diffusion.pipelines.image_encoders import open_encoder


def edges_run(b: Bench, seed: int) -> str:
    """The ControlNet's run."""
    return b.trained(
        "controlnet",
        "edges",
        seed,
        800,
        16,
        data__name="emoji_and_tiles",
        data__dir=b.data,
        data__cache=b.folder / "latents",
        data__hint="canny(low=100, high=200)",
        objective__adapter="controlnet((16, 32))",
        optimizer__decay="cosine",
        optimizer__learning_rate=1e-3,
    )


def edged(b: Bench, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(numbers of held-out pictures with 20 pixels of edges and more, edges [N, H, W] bool)."""
    lines = judges.edges(b.held_out.images)
    numbers = np.flatnonzero(lines.sum((1, 2)) >= 20)
    chosen = numbers[np.linspace(0, len(numbers) - 1, min(count, len(numbers))).astype(int)]
    return chosen, lines[chosen]


def hints(lines: np.ndarray) -> np.ndarray:
    """Edges [N, H, W] as a batch has them."""
    return np.repeat(lines[..., None], 3, -1).astype(np.float32)


def controlnet(b: Bench, seed: int) -> Found:
    """Pictures that follow edges."""
    opened = pipelines.open_any(edges_run(b, seed))
    numbers, lines = edged(b, 98)
    names, params = [b.held_out.captions[i] for i in numbers], opened.load()
    figures, drawn = {}, {}
    for scale in (0.0, 0.5, 1.0):
        options = {"given": {"hint": hints(lines)}, "scales": {"hint": scale}, "seed": seed}
        drawn[scale] = b.drawn(opened.pipeline, params, names, **options)
    compared = {f"{scale:g}": (drawn[scale], lines) for scale in drawn}
    compared["shuffled"] = drawn[1.0], np.roll(lines, len(lines) // 2, axis=0)
    compared["autoencoder"] = b.autoencoded(b.held_out.images[numbers]), lines
    for name, (pictures, wanted) in compared.items():
        found = judges.edges(pictures)
        figures[f"f1_{name}"] = judges.edge_f1(found, wanted)
        figures[f"exact_{name}"] = judges.edge_f1(found, wanted, pixels=0)
    shown = np.linspace(0, len(names) - 1, SHOWN).astype(int)
    maps = (255 * hints(lines)).astype(np.uint8)
    return figures, [
        ("edges", maps[shown]),
        ("without", drawn[0.0][shown]),
        ("with", drawn[1.0][shown]),
    ]


def reference_run(b: Bench, seed: int) -> str:
    """The IP-Adapter's run."""
    assert b.judge is not None  # which the encoder is trained with
    return b.trained(
        "ip_adapter",
        "reference",
        seed,
        900,
        16,
        data__name="emoji_and_tiles",
        data__dir=b.data,
        data__cache=b.folder / "latents",
        objective__adapter=(
            f"ip_adapter(encoder='{b.folder / 'encoder'}', features={judges.WIDTH}, start='zero')"
        ),
        objective__dropout="image_prompt(rate=0.2)",
        optimizer__decay="cosine",
        optimizer__learning_rate=1e-3,
    )


def features(b: Bench, images: np.ndarray) -> np.ndarray:
    """Those that the IP-Adapter takes."""
    return np.asarray(open_encoder(str(b.folder / "encoder")).open()(list(images))[0])


def ip_adapter(b: Bench, seed: int) -> Found:
    """Pictures like a reference, without any text."""
    opened = pipelines.open_any(reference_run(b, seed))
    given = {"image_features": features(b, b.held_out.images)}
    count = len(b.held_out.images)
    drawn = b.drawn(opened.pipeline, opened.load(), [""] * count, given=given, seed=seed)
    own, seen = np.arange(count), b.recognition
    other = np.roll(own, count // 2)
    figures = {
        "first": seen.nearest(drawn, own),
        "first_permuted": seen.nearest(drawn, other),
        "rank": seen.rank(drawn, own),
        "rank_permuted": seen.rank(drawn, other),
        "first_autoencoder": seen.nearest(b.autoencoded(b.held_out.images), own),
    }
    shown = np.linspace(4, count - 1, SHOWN).astype(int)
    return figures, [("reference", b.held_out.images[shown]), ("drawn", drawn[shown])]


def instruct_pix2pix(b: Bench, seed: int) -> Found:
    """Pictures edited as a text says."""
    source = b.train.chosen(np.arange(len(b.train.images)))
    kinds = list(judges.EDITS)
    asked = np.random.default_rng(0).integers(len(kinds), size=(2, len(source.images)))
    rows = [(i, kinds[k]) for part in asked for i, k in enumerate(part)]
    data = {
        "images": source.images[[i for i, _ in rows]],
        "edited": np.stack([judges.EDITS[kind](source.images[i]) for i, kind in rows]),
        "caption": np.array([kind for _, kind in rows]),
    }
    run = b.trained(
        "instruct_pix2pix",
        "editor",
        seed,
        700,
        16,
        data__dir=b.file("edits", **data),
        data__cache=b.folder / "edit_latents",
        optimizer__decay="cosine",
        optimizer__learning_rate=5e-4,
        ema="constant(decay=0.99)",
        sampler__guidance="instruct(3, 1.5)",
    )
    opened = pipelines.open_any(run)
    params, images = opened.load(), b.held_out.images
    turned = (images.astype(float) - edit(images) for edit in list(judges.EDITS.values())[2:])
    apart = np.min([(d**2).mean((1, 2, 3)) for d in turned], axis=0)
    colourful = (images.max(-1) - images.min(-1)).mean((1, 2))
    numbers = np.flatnonzero((apart > 300) & (colourful > 10))[: b.count(98)]
    given, asked = images[numbers], [kinds[i % len(kinds)] for i in range(len(numbers))]
    latents = np.asarray(opened.pipeline.codec.encode(params, given / 127.5 - 1, scaled=False))
    options = {"given": {"image": latents}, "seed": seed}

    def edited(texts: Sequence[str], scale: float) -> np.ndarray:
        chain = f"instruct(3, {scale})"
        return b.drawn(opened.pipeline, params, texts, chain=chain, **options)

    drawn, untold = edited(asked, 1.5), edited([""] * len(asked), 1.5)
    right = np.array(judges.edit_seen(given, drawn)) == asked
    colour = np.array([kind.startswith("make") for kind in asked])
    figures = {
        "recognised": float(right.mean()),
        "recognised_colour": float(right[colour].mean()),
        "recognised_turned": float(right[~colour].mean()),
        "recognised_untold": float(np.mean(np.array(judges.edit_seen(given, untold)) == asked)),
    }
    for scale in (1.0, 1.5, 2.5):
        made = drawn if scale == 1.5 else edited(asked, scale)
        figures[f"structure_{scale:g}"] = judges.correlation(given[colour], made[colour])
    figures["asked"] = len(asked)
    return figures, [("given", given[:SHOWN]), ("edited", drawn[:SHOWN])]


def stacked(b: Bench, seed: int) -> Found:
    """A LoRA, a word, a ControlNet and an IP-Adapter in one sampler, each switched off in turn."""
    number, _, kind = subject(b, seed)
    style, word = style_run(b, seed), f"{word_run(b, seed)}/adapter.safetensors"
    some = b.pictures("any", b.held_out.images[:1]) + "/0.png"
    numbers, lines = edged(b, 49)
    own = np.roll(numbers, len(numbers) // 2)  # references are of other things than edges
    rows = {"hint": hints(lines), "image_features": features(b, b.held_out.images)[own]}
    nets = f"canny(net='{edges_run(b, seed)}', image='{some}')"
    prompts = f"ip_adapter('{reference_run(b, seed)}', image='{some}')"
    in_style = judges.Recognition(b.judge, judges.styled(b.held_out.images))
    figures, shown = {}, []
    for off in ("none", "lora", "word", "control", "image"):
        strength = 0 if off == "lora" else 1
        pipeline, params = pipelines.load(b.base, adapters=(f"{style}({strength})", word))
        sampler = samplers.make(pipeline, steps=STEPS)
        for extension in (
            *control.make(pipeline, sampler, nets, pipeline.size, {}),
            *image_prompts.make(pipeline, sampler, prompts, pipeline.size),
        ):
            pipeline, params = extension.pipeline(pipeline), extension.load(params)
        scales = {"hint": float(off != "control"), "image_features": float(off != "image")}
        text = kind if off == "word" else "<toy>"
        options = {"given": rows, "scales": scales, "seed": seed}
        drawn = b.drawn(pipeline, params, [text] * len(own), **options)
        seen = in_style if strength else b.recognition
        figures[f"styled_without_{off}"] = b.style.share(drawn)
        figures[f"exact_without_{off}"] = judges.edge_f1(judges.edges(drawn), lines, pixels=0)
        figures[f"rank_without_{off}"] = seen.rank(drawn, own)
        figures[f"word_rank_without_{off}"] = seen.rank(drawn, number)
        if off in ("none", "lora", "control", "image"):
            shown.append(("all four" if off == "none" else f"without {off}", drawn[:SHOWN]))
    maps = (255 * hints(lines)).astype(np.uint8)
    references = b.held_out.images[own]
    return figures, [("edges", maps[:SHOWN]), ("reference", references[:SHOWN]), *shown]
