"""Adapters' files in every naming, against changes of weights that are computed by hand here."""

import json

import numpy as np
import pytest
from adapter_cases import (
    FORMATS,
    KINDS,
    UNET,
    assert_close,
    by_hand,
    chosen,
    factors,
    place,
    processor,
    random,
    tiny_models,
    under,
)
from safetensors.numpy import save_file

from diffusion.adapters.low_rank.merge import merge
from diffusion.adapters.low_rank.products import product
from diffusion.pretrained.adapters import reading


@pytest.fixture(scope="module")
def models():
    return tiny_models()


ALPHAS = {"equal": (3,), "mixed": (1, 4, 0.5), "missing": (None,), "some": (2, None)}
CASES = [
    (kind, name)
    for name, (component, *_) in FORMATS.items()
    for kind in KINDS
    if not (kind == "sd" and component == "text_encoder_2")
    and not (kind == "xl" and name == "text, kohya")
]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_every_naming(models, tmp_path, kind, name):
    model = models[kind]
    component, naming, endings = FORMATS[name]
    modules = chosen(name, model)
    for ranks in ((2,), (1, 3, 2)):
        for label, alphas in ALPHAS.items():
            if label == "some" and "alpha" not in endings:
                continue
            tensors, given = {}, {}
            for i, (module, (down, up)) in enumerate(factors(modules, ranks).items()):
                given[module] = down, up, alphas[i % len(alphas)]
                stem = naming(module)
                tensors |= {stem + endings["down"]: down, stem + endings["up"]: up}
                if "alpha" in endings and given[module][2] is not None:
                    tensors[stem + endings["alpha"]] = np.asarray(given[module][2], np.float32)
            config = {"r": ranks[0], "lora_alpha": 7.0}
            config["alpha_pattern"] = {
                m.removeprefix("text_model."): a for m, (*_, a) in given.items()
            }
            known = "alpha" not in endings and label != "missing"
            in_folder = known and "folder" in name
            about = {f"{component}.{k}": v for k, v in config.items()}
            about = {"lora_adapter_metadata": json.dumps(about)} if known and not in_folder else {}
            folder = tmp_path / f"{label}{len(ranks)}"
            folder.mkdir()
            save_file(tensors, folder / "adapter_model.safetensors", about)
            if in_folder:
                (folder / "adapter_config.json").write_text(json.dumps(config))
            read = reading.read(reading.find(folder), model.table)
            assert not read.unused
            assert not read.absent
            assert len(read.deltas) == len(modules)
            for module, parts in given.items():
                path, shape = place(model, component, module)
                assert_close(product(read.deltas[path], shape), by_hand(*parts))


CONV, SQUARE = "down_blocks.1.resnets.0.conv1", "down_blocks.1.resnets.0.time_emb_proj"
NORM = "down_blocks.1.resnets.0.norm1"


def test_every_kind(models, tmp_path):
    """LoCon and Tucker, LoHa, LoKr, full differences, biases and norms, against closed forms."""
    model, linear = models["sd"], "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    c_out, c_in = model.weights["unet"][f"{CONV}.weight"].shape[:2]
    out, width = model.weights["unet"][f"{linear}.weight"].shape
    r, alpha, s = 3, 2.0, 2 / 3
    a, b, c, d = random(out, r), random(r, width), random(out, r), random(r, width) + 1
    up, mid, down = random(c_out, r, 1, 1), random(r, r, 3, 3), random(r, c_in, 1, 1)
    ta, tb, tc, td = random(r, c_out), random(r, c_in), random(r, c_out) + 1, random(r, c_in) - 1
    t1, t2 = random(r, r, 3, 3), random(r, r, 3, 3) + 1
    k1, k2, ka = random(4, 2), random(out // 4, width // 2), random(out // 4, r)
    kb, kc = random(r, width // 2), random(4, r)
    kt, kl = random(r, c_out // 4), random(r, c_in // 2)
    tucker = "om,mnhw,ni->oihw"
    cases = {
        ("tucker", CONV): (
            {"lora_up.weight": up, "lora_mid.weight": mid, "lora_down.weight": down},
            s * np.einsum(tucker, up[..., 0, 0], mid, down[..., 0, 0]),
        ),
        ("loha", linear): (
            {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d},
            s * (a @ b) * (c @ d),
        ),
        ("loha, tucker", CONV): (
            {"hada_w1_a": ta, "hada_w1_b": tb, "hada_w2_a": tc, "hada_w2_b": td}
            | {"hada_t1": t1, "hada_t2": t2},
            s * np.einsum(tucker, ta.T, t1, tb) * np.einsum(tucker, tc.T, t2, td),
        ),
        ("lokr, whole: alpha means nothing", linear): (
            {"lokr_w1": k1, "lokr_w2": k2},
            np.kron(k1, k2),
        ),
        ("lokr, factored", linear): (
            {"lokr_w1_a": kc, "lokr_w1_b": random(r, 2), "lokr_w2_a": ka, "lokr_w2_b": kb},
            s * np.kron(kc @ random(r, 2), ka @ kb),
        ),
        ("lokr, tucker", CONV): (
            {"lokr_w1": k1, "lokr_w2_a": kt, "lokr_w2_b": kl, "lokr_t2": t1},
            s * np.kron(k1[..., None, None], np.einsum(tucker, kt.T, t1, kl)),
        ),
        ("4-D factors of a matrix", linear): (
            {"lora_up.weight": a[..., None, None], "lora_down.weight": b[..., None, None]},
            s * a @ b,
        ),
        ("full", CONV): ({"diff": random(c_out, c_in, 3, 3)}, random(c_out, c_in, 3, 3)),
        ("norm", NORM): ({"w_norm": random(c_in)}, random(c_in)),
    }
    for (name, module), (parts, expected) in cases.items():
        tensors = {f"lora_unet_{under(module)}.{part}": array for part, array in parts.items()}
        tensors[f"lora_unet_{under(module)}.alpha"] = np.asarray(alpha, np.float16)
        save_file(tensors, tmp_path / "x.safetensors")
        read = reading.read(tmp_path / "x.safetensors", model.table)
        path, shape = place(model, "unet", module)
        assert list(read.deltas) == [path], name
        assert not read.unused, name
        assert_close(product(read.deltas[path], shape), expected)
    biases = {f"lora_unet_{under(CONV)}.diff_b": random(c_out)}
    biases[f"lora_unet_{under(NORM)}.b_norm"] = random(c_in)
    save_file(biases, tmp_path / "x.safetensors")
    read = reading.read(tmp_path / "x.safetensors", model.table)
    for module, bias in ((CONV, random(c_out)), (NORM, random(c_in))):
        path = model.table.aliases[f"unet.{module}"].paths["bias"]
        np.testing.assert_array_equal(product(read.deltas[path], bias.shape), bias)


@pytest.mark.parametrize("module", [CONV, SQUARE])
@pytest.mark.parametrize("axis", ["out", "in", "peft"])
def test_dora(models, tmp_path, module, axis):
    """W' = m (W + s B A) / ||W + s B A||, with norms of rows or of columns."""
    model = models["sd"]
    w = model.weights["unet"][f"{module}.weight"].astype(np.float64)
    ((down, up),) = factors({module: w.shape}, (2,)).values()
    ones = (1,) * (w.ndim - 2)
    shapes = {"out": (len(w), 1, *ones), "in": (1, w.shape[1], *ones)}
    shapes["peft"] = (1, len(w), *ones) if ones else (len(w),)
    magnitude = np.abs(random(*shapes[axis])) + 0.5
    ending = ".lora_magnitude_vector" if axis == "peft" else ".dora_scale"
    stem = f"lora_unet_{under(module)}"
    tensors = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
    save_file(tensors | {f"{stem}{ending}": magnitude}, tmp_path / "x.safetensors")
    read = reading.read(tmp_path / "x.safetensors", model.table)
    total = w + by_hand(down, up, None)
    axes = (0, *range(2, w.ndim)) if axis == "in" else tuple(range(1, w.ndim))
    m = magnitude.reshape(shapes["out"]) if axis == "peft" else magnitude
    expected = m * total / np.sqrt((total**2).sum(axes, keepdims=True))
    params = model.opened.load()
    (path,) = read.deltas
    for strength in (1.0, 0.3):
        made = merge(params, [(read.deltas, strength)])
        kernel = made["network"]
        for name in path.split("/")[1:]:
            kernel = kernel[name]
        actual = np.moveaxis(kernel, (-1, -2), (0, 1))
        assert_close(actual, w + strength * (expected - w))


def test_namings_are_mixed_within_a_file_and_a_layer(models, tmp_path):
    model, (first, second, third) = models["xl"], list(UNET)[1:4]
    given = factors(chosen("peft", model), (2,))
    (a1, b1), (a2, b2), (a3, b3) = (given[m] for m in (first, second, third))
    tensors = {
        f"unet.{first}.lora.down.weight": a1,
        f"lora_unet_{under(UNET[first])}.lora_up.weight": b1,  # the same layer
        f"lora_unet_{under(second)}.lora_down.weight": a2,
        f"lora_unet_{under(UNET[second])}.lora_up.weight": b2,
        f"{third}.lora_A.weight": a3,
        f"unet.{processor(third)}.up.weight": b3,
    }
    save_file(tensors, tmp_path / "x.safetensors")
    read = reading.read(tmp_path / "x.safetensors", model.table)
    assert not read.unused
    for module in (first, second, third):
        path, shape = place(model, "unet", module)
        assert_close(product(read.deltas[path], shape), by_hand(*given[module], None))


def test_rank_stabilised_and_bias_of_peft(models, tmp_path):
    """alpha / sqrt(r), which only PEFT's config says; B's bias is scaled as the product is."""
    model = models["sd"]
    shape = model.weights["unet"][f"{SQUARE}.weight"].shape
    ((down, up),) = factors({SQUARE: shape}, (4,)).values()
    bias = random(len(up))
    tensors = {f"base_model.model.{SQUARE}.lora_A.weight": down}
    tensors |= {f"base_model.model.{SQUARE}.lora_B.weight": up}
    tensors |= {f"base_model.model.{SQUARE}.lora_B.bias": bias}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"r": 4, "lora_alpha": 3, "use_rslora": True, "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    read = reading.read(reading.find(tmp_path), model.table)
    layer = model.table.aliases[f"unet.{SQUARE}"]
    actual = product(read.deltas[layer.paths["weight"]], shape)
    assert_close(actual, by_hand(down, up, 3) * 2)
    assert_close(product(read.deltas[layer.paths["bias"]], bias.shape), 3 / 2 * bias)


def test_dtypes(models, tmp_path):
    """Half precision is read as it is, and multiplied in float32."""
    import ml_dtypes
    import torch
    from safetensors.torch import save_file as save_torch

    model, module = models["sd"], "conv_out"
    shape = model.weights["unet"][f"{module}.weight"].shape
    for dtype, theirs in ((np.float16, torch.float16), (ml_dtypes.bfloat16, torch.bfloat16)):
        ((down, up),) = factors({module: shape}, (2,), dtype).values()
        tensors = {"unet.conv_out.lora_A.weight": down, "unet.conv_out.lora_B.weight": up}
        tensors = {k: torch.tensor(v.astype(np.float32)).to(theirs) for k, v in tensors.items()}
        save_torch(tensors, tmp_path / "x.safetensors")
        (delta,) = reading.read(tmp_path / "x.safetensors", model.table).deltas.values()
        assert delta.down.dtype == dtype
        assert_close(product(delta, shape), by_hand(down, up, None))


def test_what_one_trainer_adds(models, tmp_path):
    """The second encoder's projection, and embeddings of tokens beside the weights."""
    out, width = models["xl"].weights["text_encoder_2"]["text_projection.weight"].shape
    up, down, rows = random(out, 2), random(2, width), random(3, 32)
    tensors = {"lora_te2_text_projection.lora_up.weight": up}
    tensors |= {"lora_te2_text_projection.lora_down.weight": down, "bundle_emb.<cat>.clip_l": rows}
    tensors |= {"bundle_emb.<cat>.clip_g": rows + 1}
    save_file(tensors, tmp_path / "x.safetensors")
    read = reading.read(tmp_path / "x.safetensors", models["xl"].table)
    assert not read.unused
    path, shape = place(models["xl"], "text_encoder_2", "text_projection")
    assert_close(product(read.deltas[path], shape), by_hand(down, up, None))
    ((token, (first, second)),) = read.words
    assert token == "<cat>"
    np.testing.assert_array_equal(first, rows)
    np.testing.assert_array_equal(second, rows + 1)
