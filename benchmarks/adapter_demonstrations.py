"""What adapters learn on a small text-to-image model, judged with controls.

    python -m benchmarks.adapter_demonstrations --base=runs/emoji --data=DATA --workdir=DIR

``--base`` is a run of configs/emoji_text_to_image.py, DATA its data. Each of seven demonstrations
trains adapters by the commands that a user types, and judges what is drawn with them by networks
and measures of adapter_judges.py. Results are kept in DIR/results.json by demonstration and seed;
what is there is not made again, so that a stopped command goes on. DIR/results.md has the table,
DIR/adapters.png the pictures. The base's parameters have to be the same to the bit at the end.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from benchmarks import adapter_judges as judges
from benchmarks import adapter_tables as tables
from benchmarks.adapter_bench import BATCH, STEPS, Bench
from diffusion import compiler, pipelines
from diffusion.evaluation.metrics.retrieval import retrieval
from diffusion.pipelines import control, image_prompts, samplers
from diffusion.pipelines.image_encoders import open_encoder

SHOWN = 6  # pictures of each demonstration
SUBJECTS = (  # held-out picture, its class, a word for it: one per seed
    ("top hat", "hat"),
    ("fire crab, animals, monster", "crab"),
    ("umbrella", "umbrella"),
)


Found = tuple[dict[str, float], list[tuple[str, np.ndarray]]]
"""Figures by name, and pictures [SHOWN, H, W, 3] with their labels."""


def lora(b: Bench, seed: int) -> Found:
    """A style, learned of 64 pictures."""
    run = style_run(b, seed)
    names = b.held_out.captions[::2]
    figures, drawn = {}, {}
    for strength in (0.0, 0.5, 1.0):
        loaded = pipelines.load(b.base, adapters=f"{run}({strength})")
        drawn[strength] = b.drawn(*loaded, names, seed=seed)
        figures[f"styled_{strength:g}"] = b.style.share(drawn[strength])
    real = b.held_out
    figures["judge"] = b.style.share(b.autoencoded(judges.styled(real.images)))
    figures["judge_plain"] = b.style.share(b.autoencoded(real.images))
    for name, strength, known in (
        ("base", 0.0, real.images),
        ("kept", 1.0, judges.styled(real.images)),
    ):
        found = retrieval(drawn[strength], names, known, real.captions)
        figures[f"among_10_{name}"] = found["among_10"]
    in_style = retrieval(
        judges.styled(drawn[0.0]), names, judges.styled(real.images), real.captions
    )
    figures["among_10_base_styled"] = in_style["among_10"]
    shown = np.linspace(0, len(names) - 1, SHOWN).astype(int)
    return figures, [("base", drawn[0.0][shown]), ("LoRA, 1", drawn[1.0][shown])]


def style_run(b: Bench, seed: int) -> str:
    """The LoRA's run."""
    chosen = np.random.default_rng(seed).choice(np.arange(0, len(b.train.images), 4), 65, False)
    own = b.train.chosen(chosen)
    data = {"images": judges.styled(own.images), "caption": np.array(own.captions)}
    return b.trained(
        "finetune_lora",
        "lora",
        seed,
        400,
        16,
        data__dir=b.file(f"style_{seed}", **data),
        data__held_out=0.01,
        objective__adapter="lora(rank=4, targets='all')",
        optimizer__learning_rate=2e-3,
    )


def views(image: np.ndarray) -> np.ndarray:
    """Five of one picture: as it is, moved, mirrored, cut."""
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode="edge")
    made = [image, padded[:-4, 4:], padded[4:, :-4], image[:, ::-1]]
    small = Image.fromarray(image[2:-2, 2:-2]).resize((judges.SIDE, judges.SIDE))
    return np.stack([*made, np.asarray(small)])


def subject(b: Bench, seed: int) -> tuple[int, str, str]:
    """(the held-out picture's number, a folder of views, the class) of a seed."""
    name, kind = SUBJECTS[seed % len(SUBJECTS)]
    number = b.held_out.captions.index(name) if name in b.held_out.captions else 0
    return number, b.pictures(f"subject_{seed}", views(b.held_out.images[number])), kind


def dreambooth(b: Bench, seed: int) -> Found:
    """A subject, learned of five pictures, with and without prior preservation."""
    number, folder, kind = subject(b, seed)
    common = {
        "data__dir": folder,
        "data__subject__prompt": f"sks {kind}",
        "objective__adapter": "lora(rank=8, targets='all')",
        "optimizer__learning_rate": 1e-3,
    }
    prior = {
        "data__subject__class_dir": b.folder / "data" / f"class_{kind}",
        "data__subject__class_prompt": kind,
        "data__subject__class_count": 4 if b.quick else 98,
        "sampler__batch_size": BATCH,
    }
    runs = {
        "prior": b.trained("dreambooth", "dreambooth", seed, 250, 16, **common, **prior),
        "alone": b.trained(
            "dreambooth", "dreambooth_alone", seed, 250, 8, **common, objective__terms="()"
        ),
    }
    count, figures, drawn = b.count(49), {}, {}
    for name, adapters in {"base": (), **runs}.items():
        loaded = pipelines.load(b.base, adapters=adapters)
        for of, prompt in (("subject", f"sks {kind}"), ("class", kind)):
            drawn[name, of] = b.drawn(*loaded, [prompt] * count, seed=seed)
            figures[f"{of}_{name}"] = b.recognition.nearest(drawn[name, of], number)
    shown = views(b.held_out.images[number])
    return figures, [
        ("subject", np.concatenate([shown, shown])[:SHOWN]),
        ("drawn", drawn["prior", "subject"][:SHOWN]),
    ]


def word_run(b: Bench, seed: int) -> str:
    """The run of textual inversion."""
    _, folder, kind = subject(b, seed)
    return b.trained(
        "textual_inversion",
        "word",
        seed,
        300,
        16,
        data__dir=folder,
        data__template="",
        data__subject__prompt="<toy>",
        objective__adapter=f"textual_inversion('<toy>', init='{kind}', vectors=1)",
        optimizer__learning_rate=5e-3,
    )


def textual_inversion(b: Bench, seed: int) -> Found:
    """A subject as a word of one vector."""
    number, _, kind = subject(b, seed)
    loaded = pipelines.load(b.base, adapters=f"{word_run(b, seed)}/adapter.safetensors")
    count = b.count(98)
    drawn = b.drawn(*loaded, ["<toy>"] * count, seed=seed)
    before = b.drawn_base([kind] * count, seed)
    seen = b.recognition
    figures = {
        "word": seen.nearest(drawn, number),
        "initial": seen.nearest(before, number),
        "word_rank": seen.rank(drawn, number),
        "initial_rank": seen.rank(before, number),
    }
    return figures, [(f'"{kind}"', before[:SHOWN]), ("<toy>", drawn[:SHOWN])]


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
        figures[f"f1_{scale:g}"] = judges.edge_f1(judges.edges(drawn[scale]), lines)
    other = np.roll(lines, len(lines) // 2, axis=0)
    figures["f1_shuffled"] = judges.edge_f1(judges.edges(drawn[1.0]), other)
    real = judges.edges(b.autoencoded(b.held_out.images[numbers]))
    figures["f1_autoencoder"] = judges.edge_f1(real, lines)
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

    def recognised(drawn: np.ndarray) -> float:
        seen = judges.edit_seen(given, drawn)
        return float(np.mean([one == other for one, other in zip(seen, asked)]))

    drawn, untold = edited(asked, 1.5), edited([""] * len(asked), 1.5)
    figures = {"recognised": recognised(drawn), "recognised_untold": recognised(untold)}
    recolour = [i for i, kind in enumerate(asked) if kind.startswith("make")]
    for scale in (1.0, 1.5, 2.5):
        made = drawn if scale == 1.5 else edited(asked, scale)
        figures[f"structure_{scale:g}"] = judges.correlation(given[recolour], made[recolour])
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
        figures[f"f1_without_{off}"] = judges.edge_f1(judges.edges(drawn), lines)
        figures[f"rank_without_{off}"] = seen.rank(drawn, own)
        figures[f"word_rank_without_{off}"] = seen.rank(drawn, number)
        if off in ("none", "lora", "control", "image"):
            shown.append(("all four" if off == "none" else f"without {off}", drawn[:SHOWN]))
    maps = (255 * hints(lines)).astype(np.uint8)
    references = b.held_out.images[own]
    return figures, [("edges", maps[:SHOWN]), ("reference", references[:SHOWN]), *shown]


ALL: dict[str, Callable[[Bench, int], Found]] = {
    "lora": lora,
    "dreambooth": dreambooth,
    "textual_inversion": textual_inversion,
    "controlnet": controlnet,
    "ip_adapter": ip_adapter,
    "instruct_pix2pix": instruct_pix2pix,
    "stacked": stacked,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", required=True, help="run of configs/emoji_text_to_image.py")
    parser.add_argument("--data", required=True, help="folder of its pictures")
    parser.add_argument("--workdir", required=True, type=Path, help="where runs and results go")
    parser.add_argument("--only", default=",".join(ALL), help="demonstrations, with commas")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a few steps, to try the script")
    given = parser.parse_args()
    print(compiler.tune())
    cache = Path("~/.cache/diffusion-jax").expanduser()
    jax.config.update("jax_compilation_cache_dir", str(cache))
    given.workdir.mkdir(parents=True, exist_ok=True)
    folder = given.workdir.resolve()
    bench = Bench(str(Path(given.base).resolve()), given.data, folder, given.quick)
    results, before = tables.Results(folder), bench.hash()
    for seed in range(given.seeds):
        for name in given.only.split(","):
            if results.has(name, seed):
                continue
            bench.seconds.clear()
            began = time.perf_counter()
            try:
                figures, shown = ALL[name](bench, seed)
            except Exception:
                traceback.print_exc()  # the others go on; the same command tries this one again
                continue
            figures["seconds"] = round(time.perf_counter() - began)
            figures |= {f"seconds_{run}": value for run, value in bench.seconds.items()}
            results.add(name, seed, figures, shown)
            print(name, seed, json.dumps(figures), flush=True)
            assert bench.hash() == before, "the base's parameters have changed"
    print(f"the base's parameters are as they were: {before[:16]}")


if __name__ == "__main__":
    main()
