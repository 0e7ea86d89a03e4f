"""Adapters' files that are refused, and what the messages name."""

import json

import numpy as np
import pytest
from adapter_cases import UNET, lora, random, tiny_models, under
from safetensors.numpy import save_file

from diffusion.pipelines.adapters import attach
from diffusion.pretrained.adapters import reading


@pytest.fixture(scope="module")
def models():
    return tiny_models()


FIRST = f"lora_unet_{under(next(iter(UNET)))}"


def changed(tensors, **changes):
    """With tensors of the first layer replaced, or left out where they are None."""
    made = tensors | {f"{FIRST}.{k.replace('__', '.')}": v for k, v in changes.items()}
    return {key: value for key, value in made.items() if value is not None}


def test_mistakes(models, tmp_path):
    model, file = models["sd"], tmp_path / "x.safetensors"
    good = lora(model)

    def refused(tensors, about=None):
        save_file(tensors, file, about)
        with pytest.raises(ValueError, match=r"x\.safetensors") as error:
            reading.read(file, model.table)
        return str(error.value)

    nan = good[f"{FIRST}.lora_up.weight"].copy()
    nan[3] = np.nan
    text = refused(changed(good, lora_up__weight=nan))
    assert f"{FIRST}.lora_up.weight" in text
    assert "not finite" in text
    text = refused(changed(good, lora_up__weight=None))
    assert f"{FIRST}.lora_down.weight" in text
    assert "'up' is missing" in text
    text = refused(changed(good, lora_up__weight=random(7, 2)))
    assert "(7, 2)" in text
    assert "(16, 16, 1, 1)" in text
    assert f"{FIRST}.lora_up.weight" in text
    assert "do not fit" in refused(changed(good, lora_up__weight=random(16, 3)))  # ranks
    assert "dora_scale" in refused(changed(good, dora_scale=random(5, 1, 1, 1)))
    assert "another way" in refused(changed(good, diff=random(16, 16, 1, 1)))
    assert "floating" in refused(changed(good, lora_up__weight=np.ones((16, 2), np.int8)))
    assert "not equal" in refused(
        good | {f"lycoris_{FIRST[10:]}.lora_up.weight": random(16, 2, 1, 1)}
    )
    assert "none of its 1 tensors" in refused({"something.lora_A.weight": random(2, 2)})
    assert "config.control" in refused({"zero_convs.0.0.weight": random(2, 2)})
    assert "config.control" in refused({"controlnet_cond_embedding.conv_in.weight": random(2, 2)})
    assert "Control-LoRA" in refused({"lora_controlnet": random(1), **good})
    assert "config.image_prompts" in refused({"ip_adapter.1.to_k_ip.weight": random(2, 2)})
    assert "config.model.path" in refused({"conv_in.weight": random(2, 2)})
    assert "FLUX" in refused(
        {"lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": random(2, 2)}
    )
    bad = {"lora_adapter_metadata": '{"unet.alpha_pattern": {"(": 1}}'}
    assert "damaged" in refused(good, bad)
    save_file(good, file)
    content = file.read_bytes()
    file.write_bytes(content[:-9])
    with pytest.raises(ValueError, match="truncated"):
        reading.read(file, model.table)
    file.with_suffix(".pt").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="unpickling"):
        reading.read(file.with_suffix(".pt"), model.table)


CONV = f"lora_unet_{under('down_blocks.1.resnets.0.conv1')}"  # (32, 16, 3, 3)
LINEAR = f"lora_unet_{under(list(UNET)[1])}"  # (16, 16)
KRONECKER = {"lokr_w1": (4, 4), "lokr_w2": (4, 4)}
PAIR = {"lora_down.weight": (2, 16), "lora_up.weight": (16, 2)}


@pytest.mark.parametrize(
    ("layer", "shapes", "expected"),
    [
        (LINEAR, {"lora_down.weight": (0, 16), "lora_up.weight": (16, 0)}, "do not fit"),
        (LINEAR, {"lokr_w1": (4, 4), "lokr_w2_a": (4, 0), "lokr_w2_b": (0, 4)}, "do not fit"),
        (CONV, {"lora_down.weight": (2, 3, 3, 16), "lora_up.weight": (32, 2, 1, 1)}, "do not fit"),
        (CONV, {"diff": (32, 3, 3, 16)}, "do not fit"),
        (CONV, {"lokr_w1": (4, 4), "lokr_w2": (8, 3, 3, 4)}, "do not fit"),
        (
            CONV,
            {
                "lora_down.weight": (2, 16, 1, 1),
                "lora_up.weight": (32, 2, 1, 1),
                "lora_mid.weight": (2, 2, 9),
            },
            "do not fit",
        ),
        (LINEAR, KRONECKER | {"lokr_w1_a": (4, 2), "lokr_w1_b": (2, 4)}, "exclude each other"),
        (LINEAR, KRONECKER | {"lokr_w2_a": (4, 2)}, "exclude each other"),
        (LINEAR, KRONECKER | {"lokr_t2": (2, 2, 1, 1)}, "exclude each other"),
        (LINEAR, PAIR | {"dora_scale": (16, 1), "lora_magnitude_vector": (16,)}, "exclude each"),
        (LINEAR, PAIR | {"diff_b": (16,)}, "has no bias"),
        (LINEAR, {}, "no tensors"),
    ],
)
def test_tensors_that_do_not_go_together(models, tmp_path, layer, shapes, expected):
    file = tmp_path / "x.safetensors"
    save_file({f"{layer}.{part}": random(*shape) for part, shape in shapes.items()}, file)
    with pytest.raises(ValueError, match=expected):
        reading.read(file, models["sd"].table)


def test_a_dotted_name_of_the_original_code_is_no_whole_network(models, tmp_path):
    name = f"model.diffusion_model.{UNET[list(UNET)[1]]}"
    for down, up in (("lora_A", "lora_B"), ("lora_down", "lora_up"), ("lora.down", "lora.up")):
        file = tmp_path / "x.safetensors"
        tensors = {f"{name}.{down}.weight": random(2, 16), f"{name}.{up}.weight": random(16, 2)}
        save_file(tensors, file)
        found = reading.read(file, models["sd"].table)
        assert len(found.deltas) == 1
        assert not found.unused
    save_file({f"{name}.weight": random(16, 16)}, file)
    with pytest.raises(ValueError, match="whole network"):
        reading.read(file, models["sd"].table)


@pytest.mark.parametrize("ending", ["", ".default", ".weight", ".default.weight"])
def test_every_name_of_a_magnitude_is_read(models, tmp_path, ending):
    file = tmp_path / "x.safetensors"
    tensors = {f"{LINEAR}.{part}": random(*shape) for part, shape in PAIR.items()}
    save_file(tensors | {f"{LINEAR}.lora_magnitude_vector{ending}": random(16)}, file)
    found = reading.read(file, models["sd"].table)
    (delta,) = found.deltas.values()
    np.testing.assert_array_equal(delta.magnitude[:, 0], random(16))
    assert not found.unused


def test_sums_beyond_the_dtype_are_refused(models, tmp_path):
    """The factors are finite, their product is not."""
    file = tmp_path / "x.safetensors"
    save_file(
        {f"{LINEAR}.{part}": np.full(shape, 1e25, np.float32) for part, shape in PAIR.items()}, file
    )
    model = models["sd"].opened
    with pytest.raises(ValueError, match="attn1/to_q/kernel has values that float32 cannot hold"):
        attach(model, str(file)).load()


def test_whole_matrices_of_peft_have_the_scale_of_their_layer(models, tmp_path):
    folder, name = tmp_path, list(UNET)[1]
    tensors = {f"base_model.model.{name}.{k}": random(*s) for k, s in KRONECKER.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    for rank, expected in (({}, 6 / 8), ({"attn1.to_q": 4}, 6 / 4)):
        fields = {"peft_type": "LOKR", "alpha": 6, "r": 8, "rank_pattern": rank}
        (folder / "adapter_config.json").write_text(json.dumps(fields))
        found = reading.read(folder / "adapter_model.safetensors", models["sd"].table)
        (delta,) = found.deltas.values()
        assert float(delta.scale) == expected
    for damaged in ({"r": "x"}, {"rank_pattern": {"to_q": None}}):
        (folder / "adapter_config.json").write_text(json.dumps(fields | damaged))
        with pytest.raises(ValueError, match="damaged"):
            reading.read(folder / "adapter_model.safetensors", models["sd"].table)


def test_factors_of_blocks_that_the_adapter_does_not_change_are_refused(models, tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({f"{LINEAR}.{part}": random(*shape) for part, shape in PAIR.items()}, file)
    attach(models["sd"].opened, f"{file}(down=(0.5, 1))")
    for text in ("up=0.5", "mid=0", "up=(1, 0)"):
        with pytest.raises(ValueError, match="has no effect: the adapter changes nothing in these"):
            attach(models["sd"].opened, f"{file}({text})")


def test_files_for_another_base_are_refused_by_its_name(models, tmp_path):
    file = tmp_path / "x.safetensors"
    for name in ("kohya", "peft", "processors", "kohya, original blocks"):
        save_file(lora(models["xl"], name), file)
        with pytest.raises(ValueError, match=r"made for .* 64 numbers.* this model is .* 32 numb"):
            reading.read(file, models["sd"].table)
    table = models["sd"].table._replace(context=768)
    text = lora(models["sd"], "text, kohya")
    for about, name in (
        ({"ss_base_model_version": "sdxl_base_v1-0"}, "SDXL"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, "Stable Diffusion 2"),
    ):
        save_file(text, file, about)
        with pytest.raises(
            ValueError, match=rf"made for {name} .*this model is Stable Diffusion 1"
        ):
            reading.read(file, table)
    for version in ("sd_v1", "sd_1.5", "stable-diffusion-v1"):
        save_file(text, file, {"ss_base_model_version": version})
        assert reading.read(file, table).deltas


def test_unused_and_absent(models, tmp_path):
    file = tmp_path / "x.safetensors"
    save_file(lora(models["sd"]) | {"mystery.alpha": random(1)}, file)
    assert reading.read(file, models["sd"].table).unused == ("mystery.alpha",)
    with pytest.warns(UserWarning, match=r"1 tensors belong to no layer.*mystery\.alpha"):
        attach(models["sd"].opened, str(file))
    second = {
        k.replace("lora_te1", "lora_te2"): v for k, v in lora(models["sd"], "text, kohya 1").items()
    }
    save_file(lora(models["sd"]) | second, file)
    with pytest.raises(
        ValueError, match=r"text_encoder_2, which this model does not have.*text_2=0"
    ):
        attach(models["sd"].opened, str(file))
    assert attach(models["sd"].opened, f"{file}(text_2=0)").attached
    save_file({key: value for key, value in second.items() if "lora_te2" in key}, file)
    with pytest.raises(ValueError, match="nothing of the adapter is for this model"):
        attach(models["sd"].opened, f"{file}(text_2=0)")


def test_words_that_come_with_weights(models, tmp_path):
    file, rows = tmp_path / "x.safetensors", random(2, 32)
    save_file(lora(models["sd"]) | {"bundle_emb.<cat>.clip_l": rows}, file)
    opened = attach(models["sd"].opened, f"{file}(0.5)")
    assert [word for word, *_ in opened.pipeline.conditioner.words] == ["<cat>"]
    embedding = opened.load()["encoders"][0]["embeddings"]["token_embedding"]["embedding"]
    np.testing.assert_array_equal(embedding[-2:], rows)
    save_file(lora(models["sd"]) | {"bundle_emb.<cat>.clip_l": random(2, 31)}, file)
    with pytest.raises(ValueError, match=r"embeddings of \[31\] numbers"):
        attach(models["sd"].opened, str(file))
