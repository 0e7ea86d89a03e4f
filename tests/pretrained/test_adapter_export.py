"""What is written is read back to the bit, and by diffusers."""

import jax
import numpy as np
import pytest
from adapter_cases import (
    UNET,
    assert_close,
    chosen,
    factors,
    place,
    random,
    tiny_models,
)
from safetensors.numpy import load_file

from diffusion.adapters.low_rank.deltas import (
    Decomposed,
    Full,
    Hadamard,
    Kronecker,
    LowRank,
)
from diffusion.adapters.low_rank.merge import merge
from diffusion.pipelines.adapters import save
from diffusion.pretrained import files
from diffusion.pretrained.adapters import reading

CONV, NORM = "down_blocks.1.resnets.0.conv1", "down_blocks.1.resnets.0.norm1"


@pytest.fixture(scope="module")
def models():
    return tiny_models()


def low_rank(model, component, name="peft", ranks=(1, 3, 2)):
    """Deltas of several modules, with scales of which 1 / 3 has no exact alpha in float32."""
    scales = (1.0, np.float32(1 / 3), 0.7, np.float32(0.1234567))
    made = {}
    for i, (module, (down, up)) in enumerate(factors(chosen(name, model), ranks).items()):
        path, _ = place(model, component, module)
        made[path] = LowRank(down, up, np.asarray(scales[i % 4], np.float32))
    return made


def assert_same(read, given):
    assert read.keys() == given.keys()
    for path, delta in given.items():
        assert type(read[path]) is type(delta), path
        for a, b in zip(jax.tree.leaves(read[path]), jax.tree.leaves(delta), strict=True):
            np.testing.assert_array_equal(a, np.asarray(b), path)


@pytest.mark.parametrize("naming", ["peft", "kohya"])
@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_round_trip_to_the_bit(models, tmp_path, kind, naming):
    model = models[kind]
    deltas = low_rank(model, "unet") | low_rank(model, "text_encoder", "text, peft")
    if kind == "xl":
        deltas |= low_rank(model, "text_encoder_2", "text 2, peft")
    path, shape = place(model, "unet", CONV)
    deltas[path] = Decomposed(deltas[path], random(shape[0], 1, 1, 1))
    args = (deltas, model.opened.pipeline, model.opened.shapes)
    save(tmp_path / "x.safetensors", *args, naming=naming, about={"mine": "yes"})
    read = reading.read(tmp_path / "x.safetensors", model.table)
    assert not read.unused
    assert read.about["mine"] == "yes"
    assert_same(read.deltas, deltas)
    keys = load_file(tmp_path / "x.safetensors")
    text = [key for key in keys if "encoder_layers" in key or "encoder.layers" in key]
    assert text
    assert all("text_model" in key for key in text)
    if naming == "kohya":
        assert any("input_blocks" in key for key in keys) == (kind == "xl")
        assert any(key.startswith("lora_te_") for key in keys) == (kind == "sd")
    save(tmp_path / "half.safetensors", *args, naming=naming, dtype=np.float16)
    half = files.open_file(tmp_path / "half.safetensors")
    kinds = {str(t.dtype) for key, t in half.items() if not key.endswith(".alpha")}
    assert kinds == {"float16"}


def test_every_kind_goes_out_as_lycoris(models, tmp_path):
    model, linear = models["sd"], "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    (conv, (o, i, *_)), (matrix, (out, width)) = (place(model, "unet", m) for m in (CONV, linear))
    one, scale = np.ones((), np.float32), np.asarray(0.7, np.float32)
    mid = random(2, 2, 3, 3)
    norm = model.table.aliases[f"unet.{NORM}"].paths
    tucker = random(2, o), random(2, i), random(2, o) + 1, random(2, i) + 1
    plain = random(out, 2), random(2, width), random(out, 2), random(2, width)
    common = {norm["weight"]: Full(random(i), one), norm["bias"]: Full(random(i), one)}
    common[conv.replace("kernel", "bias")] = Full(random(o), one)
    kr = Kronecker(random(4, 2), (random(out // 4, 2), random(2, width // 2)), scale)
    for deltas in (
        {conv: LowRank(random(2, i, 1, 1), random(o, 2, 1, 1), scale, mid)},
        {conv: Hadamard(*tucker, scale, mid, mid + 1)},
        {matrix: Hadamard(*plain, scale)},
        {matrix: kr},
        {matrix: Kronecker(random(4, 2), random(out // 4, width // 2), one)},
        {matrix: Decomposed(kr, random(1, width))},
        {conv: Full(random(o, i, 3, 3), one)},
    ):
        given = deltas | common
        args = (given, model.opened.pipeline, model.opened.shapes)
        save(tmp_path / "x.safetensors", *args)
        read = reading.read(tmp_path / "x.safetensors", model.table)
        assert_same(read.deltas, given)
        assert read.about["ss_network_module"] == "lycoris.kohya"
        with pytest.raises(ValueError, match="PEFT has no name for this kind; choose kohya"):
            save(tmp_path / "y.safetensors", *args, naming="peft")
        assert not (tmp_path / "y.safetensors").exists()


def test_refused(models, tmp_path):
    model = models["sd"]
    rest = model.opened.pipeline, model.opened.shapes
    with pytest.raises(ValueError, match="network/x/kernel is no parameter of this model"):
        save(tmp_path / "x", {"network/x/kernel": Full(random(2), np.ones(()))}, *rest)
    with pytest.raises(ValueError, match=r"naming: unknown 'keft'.*Did you mean 'peft'"):
        save(tmp_path / "x", low_rank(model, "unet"), *rest, naming="keft")
    path, delta = next(iter(low_rank(model, "unet").items()))
    for wrong, dtype, message in (
        (delta.replace(up=1e6 * np.sign(delta.up)), np.float16, "not finite in this dtype"),
        (delta.replace(up=np.nan * delta.up), None, "not finite"),
        (delta.replace(scale=np.zeros(())), None, "has the scale 0"),  # read as alpha = rank
    ):
        for naming in ("peft", "kohya"):
            with pytest.raises(ValueError, match=message):
                save(tmp_path / "x", {path: wrong}, *rest, naming=naming, dtype=dtype)
            assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("kind", "naming"), [("sd", "peft"), ("sd", "dora"), ("sd", "kohya"), ("xl", "kohya")]
)
def test_diffusers_reads_it(models, tmp_path, kind, naming):
    """In PEFT's naming with the rank and scale of each module. Of kohya's files it reads alphas
    rightly where all are equal."""
    pytest.importorskip("peft")
    model = models[kind]
    deltas = low_rank(model, "unet")
    if naming == "kohya":
        deltas = {
            path: delta.replace(scale=np.asarray(1.5 / len(delta.down), np.float32))
            for path, delta in deltas.items()
        }
    if naming == "dora":
        for path, delta in deltas.items():
            ones = (1,) * (np.ndim(delta.down) - 1)
            magnitude = np.abs(random(len(delta.up))).reshape(-1, *ones) + 0.5
            deltas[path] = Decomposed(delta, magnitude)
    args = deltas, model.opened.pipeline, model.opened.shapes
    save(tmp_path / "x.safetensors", *args, naming="kohya" if naming == "kohya" else None)
    theirs = model.theirs
    theirs.load_lora_weights(tmp_path, weight_name="x.safetensors")
    theirs.fuse_lora(components=["unet"])
    weights = {k: v.numpy() for k, v in theirs.unet.state_dict().items()}
    merged = merge(model.opened.load(), [(deltas, 1.0)])["network"]
    try:
        for module in UNET:
            if kind == "xl" and "upsamplers" in module:
                continue  # diffusers expects attention before it, which SDXL itself has
            path, _ = place(model, "unet", module)
            kernel = merged
            for name in path.split("/")[1:]:
                kernel = kernel[name]
            actual = np.moveaxis(kernel, (-1, -2), (0, 1))
            key = next(
                k for k in (f"{module}.base_layer.weight", f"{module}.weight") if k in weights
            )
            assert_close(actual, weights[key])
    finally:
        theirs.unfuse_lora(components=["unet"])
        theirs.unload_lora_weights()


@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_what_diffusers_writes_is_read(models, tmp_path, kind):
    """Its own export, with unequal ranks and alphas in the metadata."""
    peft = pytest.importorskip("peft")
    import torch
    from diffusers.utils import convert_state_dict_to_diffusers

    model, module = models[kind], "up_blocks.1.attentions.1.transformer_blocks.0.attn1.to_out.0"
    torch.manual_seed(0)
    unet = model.theirs.unet
    config = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=["to_q", "to_out.0", "conv1"],
        rank_pattern={module: 4}, alpha_pattern={"conv1": 1}, init_lora_weights=False,
    )  # fmt: skip
    unet.add_adapter(config, "x")
    try:
        state = convert_state_dict_to_diffusers(
            peft.get_peft_model_state_dict(unet, adapter_name="x")
        )
        model.theirs.save_lora_weights(
            tmp_path, unet_lora_layers=state, unet_lora_adapter_metadata=config.to_dict()
        )
        read = reading.read(reading.find(tmp_path), model.table)
        assert not read.unused
        params = merge(model.opened.load(), [(read.deltas, 1.0)])["network"]
        checked = 0
        for name, layer in unet.named_modules():
            if not hasattr(layer, "lora_A"):
                continue
            path, _ = place(model, "unet", name)
            kernel = params
            for part in path.split("/")[1:]:
                kernel = kernel[part]
            with torch.no_grad():
                w = (layer.base_layer.weight + layer.get_delta_weight("x")).numpy()
            # Both sum in float32, in other orders.
            assert_close(np.moveaxis(kernel, (-1, -2), (0, 1)), w, 3e-6)
            checked += 1
        assert checked == len(read.deltas) > 10
    finally:
        unet.delete_adapters("x")
