"""Demonstrations of adapters of weights and words: LoRA, DreamBooth, textual inversion."""

from __future__ import annotations

import numpy as np
from PIL import Image

from benchmarks import adapter_judges as judges
from benchmarks.adapter_bench import BATCH, SHOWN, Bench, Found
from diffusion import pipelines
from diffusion.evaluation.metrics.retrieval import retrieval

SUBJECTS = (  # held-out picture, its class, a word for it: one per seed
    ("top hat", "hat"),
    ("fire crab, animals, monster", "crab"),
    ("umbrella", "umbrella"),
)


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
