"""safetensors files and model folders: what is read, what is written, what is refused."""

import json
import re
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from diffusion.pretrained import files, folders, hub

BASE = folders.DIFFUSERS


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "conv.weight": rng.normal(size=(3, 2, 3, 3)).astype(np.float32),
        "half.weight": rng.normal(size=(4, 3)).astype(np.float16),
        "brain.weight": rng.normal(size=(7,)).astype(jnp.bfloat16),
        "position_ids": np.arange(4)[None],
        "scalar": np.array(3.0, np.float32),
        "empty": np.zeros((0, 3), np.float32),
        "flag": np.array([True, False]),
    }


def tensors(values):
    return {key: files.of_array(value) for key, value in values.items()}


def values(stored):
    return {key: tensor.read() for key, tensor in stored.items()}


def assert_same(one, other):
    assert set(one) == set(other)
    for key in one:
        assert one[key].dtype == other[key].dtype and one[key].shape == other[key].shape, key
        np.testing.assert_array_equal(one[key], other[key])


def test_files_are_the_reference_librarys(tmp_path):
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    files.write_file(ours, tensors(arrays()))
    save_file(arrays(), theirs)
    assert_same(load_file(ours), arrays())
    for path in (ours, theirs):
        stored = files.open_file(path)
        assert_same(values(stored), arrays())
        assert stored["half.weight"].dtype == np.float16 and stored["conv.weight"].nbytes == 216
    assert files.metadata(ours) == {"format": "pt"} and files.metadata(theirs) == {}
    with safe_open(ours, "numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_jax_arrays_are_written_as_they_are(tmp_path):
    files.write_file(tmp_path / "a.safetensors", {"a": files.of_array(jnp.ones(3, jnp.bfloat16))})
    assert load_file(tmp_path / "a.safetensors")["a"].dtype == jnp.bfloat16


def header(path):
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(path, change):
    """The file with another header."""
    head, body = header(path)
    change(head)
    encoded = json.dumps(head).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + body)


FAULTS = {
    "truncated data": (lambda p: p.write_bytes(p.read_bytes()[:-1]), "is truncated: 2"),
    "truncated header": (lambda p: p.write_bytes(p.read_bytes()[:100]), "is truncated"),
    "empty": (lambda p: p.write_bytes(b""), "is truncated"),
    "too long": (lambda p: p.write_bytes(p.read_bytes() + b"x"), "is too long"),
    "no header": (lambda p: p.write_bytes(b"\x02" + bytes(7) + b"[]"), "header is list"),
    "no JSON": (lambda p: p.write_bytes(b"\x02" + bytes(7) + b"{]"), "its header is Expect"),
    "float8": (
        lambda p: with_header(p, lambda h: h["flag"].update(dtype="F8_E4M3")),
        "'flag' is stored as F8_E4M3, which is not supported",
    ),
    "shape": (
        lambda p: with_header(p, lambda h: h["brain.weight"].update(shape=[9])),
        "'brain.weight' should take 18 bytes",
    ),
    "entry": (
        lambda p: with_header(p, lambda h: h["flag"].pop("shape")),
        "entry for 'flag' is damaged",
    ),
    "offsets": (
        lambda p: with_header(p, lambda h: h["flag"].update(data_offsets=[0, 2])),
        "gaps or overlap",
    ),
    "pointer": (
        lambda p: p.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "git lfs pull",
    ),
    "pickle inside": (lambda p: p.write_bytes(b"PK\x03\x04" + bytes(90)), "unpickling"),
}


def odd(change):
    return lambda p: with_header(p, change)


FAULTS |= {
    name: (odd(change), "header's entry for 'flag' is damaged")
    for name, change in {
        "float offsets": lambda h: h["flag"].update(data_offsets=[0.0, 2.0]),
        "offsets as text": lambda h: h["flag"].update(data_offsets=["0", "2"]),
        "no offset": lambda h: h["flag"].update(data_offsets=[None, 2]),
        "boolean offsets": lambda h: h["flag"].update(data_offsets=[False, True]),
        "three offsets": lambda h: h["flag"].update(data_offsets=[0, 1, 2]),
        "dtype as list": lambda h: h["flag"].update(dtype=["BOOL"]),
        "shape as text": lambda h: h["flag"].update(shape="2"),
        "float shape": lambda h: h["flag"].update(shape=[1.9]),
        "negative shape": lambda h: h["flag"].update(shape=[-2]),
        "entry as list": lambda h: h.update(flag=[1]),
    }.items()
}
FAULTS |= {
    "metadata as list": (odd(lambda h: h.update(__metadata__=[1])), "__metadata__ must be texts"),
    "number in metadata": (
        odd(lambda h: h.update(__metadata__={"a": 1})),
        "__metadata__ must be texts",
    ),
    "deep nesting": (
        lambda p: raw_header(p, b"[" * 100_000),
        "not a safetensors file",
    ),
    "huge number": (lambda p: raw_header(p, b'{"a": ' + b"9" * 5000 + b"}"), "not a safetensors"),
    "UTF-16": (lambda p: raw_header(p, '{"a": 1}'.encode("utf-16")), "not a safetensors file"),
}


def raw_header(path, header):
    path.write_bytes(len(header).to_bytes(8, "little") + header)


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_files_are_refused(tmp_path, fault):
    path = tmp_path / "model.safetensors"
    files.write_file(path, tensors(arrays()))
    damage, message = FAULTS[fault]
    damage(path)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        files.open_file(path)
    assert "model.safetensors" in str(error.value)


def test_a_file_cut_after_it_was_opened(tmp_path):
    path = tmp_path / "model.safetensors"
    files.write_file(path, tensors({"a": np.ones(5, np.float32)}))
    stored = files.open_file(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="truncated: 4 bytes missing"):
        stored["a"].read()


def test_an_interrupted_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.safetensors"
    files.write_file(path, tensors(arrays()))
    fails = files.Tensor((2,), np.dtype("float32"), lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        files.write_file(path, {**tensors(arrays(1)), "z": fails})
    assert_same(values(files.open_file(path)), arrays())
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "v1-5.ckpt", "model.pt"])
def test_pickles_are_refused_with_the_way_to_convert(tmp_path, name):
    torch = pytest.importorskip("torch")
    path = tmp_path / name
    weights = {"a": torch.ones(2, 3).T, "b": torch.zeros(1)}
    weights["tied"] = weights["a"]
    torch.save({"state_dict": weights, "global_step": 3} if "ckpt" in name else weights, path)
    asks = [files.open_file] if "ckpt" in name else [files.open_file, lambda p: _folder(p.parent)]
    for ask in asks:
        with pytest.raises(ValueError, match="runs whatever code is in them") as error:
            ask(path)
    # The lines are to be taken as they stand.
    exec(str(error.value).split("Python:\n")[1], {})
    converted = values(files.open_file(path.with_suffix(".safetensors")))
    assert set(converted) == {"a", "b", "tied"}
    np.testing.assert_array_equal(converted["a"], np.ones((3, 2)))


def _folder(folder):
    return folders.open_folder(folder)


# --- folders


def write(folder, variant=None, base=BASE, shard=40, seed=0):
    folders.write_folder(
        folder, base, tensors(arrays(seed)), max_shard_bytes=shard, variant=variant
    )


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("base", [BASE, folders.TRANSFORMERS])
@pytest.mark.parametrize("shard", [40, 1e9])
def test_folders_round_trip(tmp_path, base, variant, shard):
    write(tmp_path / "new/unet", variant, base, shard)
    assert_same(values(folders.open_folder(tmp_path / "new/unet", variant)), arrays())


def test_names_of_shards(tmp_path):
    write(tmp_path, "fp16")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        *(f"{BASE}.fp16-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)),
        f"{BASE}.safetensors.index.fp16.json",
    ]
    index = json.loads((tmp_path / names[-1]).read_text())
    assert index["metadata"] == {"total_size": sum(a.nbytes for a in arrays().values())}
    assert index["weight_map"]["conv.weight"] == names[0]
    # Too large for any shard: one of its own. The others fit into two.
    assert list(load_file(tmp_path / names[0])) == ["conv.weight"]


def test_former_names_of_shards(tmp_path):
    write(tmp_path, "fp16")
    index = tmp_path / f"{BASE}.safetensors.index.fp16.json"
    content = index.read_text()
    for i in (1, 2, 3):
        new, old = (
            f"{BASE}.fp16-{i:05d}-of-00003.safetensors",
            f"{BASE}-{i:05d}-of-00003.fp16.safetensors",
        )
        content = content.replace(new, old)
        (tmp_path / new).rename(tmp_path / old)
    index.unlink()
    assert folders.variants(tmp_path) == {"fp16"}
    with pytest.raises(FileNotFoundError, match=r"shards, but not their index\.json"):
        folders.open_folder(tmp_path, "fp16")
    (tmp_path / f"{BASE}.safetensors.fp16.index.json").write_text(content)
    assert_same(values(folders.open_folder(tmp_path, "fp16")), arrays())
    write(tmp_path, "fp16", shard=1e9, seed=1)
    assert [path.name for path in tmp_path.iterdir()] == [f"{BASE}.fp16.safetensors"]


def test_weights_are_replaced_variant_by_variant(tmp_path):
    write(tmp_path)
    write(tmp_path, "fp16", shard=1e9, seed=1)
    assert folders.variants(tmp_path) == {None, "fp16"}
    write(tmp_path, shard=1e9, seed=2)
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{BASE}.safetensors",
        f"{BASE}.fp16.safetensors",
    }
    assert_same(values(folders.open_folder(tmp_path)), arrays(2))
    assert_same(values(folders.open_folder(tmp_path, "fp16")), arrays(1))
    write(tmp_path, seed=3)
    assert_same(values(folders.open_folder(tmp_path)), arrays(3))


def _edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


SECOND = f"{BASE}-00002-of-00003.safetensors"
FOLDER_FAULTS = {
    "missing shard": (
        lambda d, i: (d / SECOND).unlink(),
        FileNotFoundError,
        f"1 of 3 shards named by {BASE}.safetensors.index.json are missing: {SECOND}",
    ),
    "damaged shard": (
        lambda d, i: (d / SECOND).write_bytes((d / SECOND).read_bytes()[:-1]),
        ValueError,
        f"{SECOND} is truncated",
    ),
    "absent key": (
        lambda d, i: _edit(i, lambda c: c["weight_map"].update({"ghost.weight": SECOND})),
        ValueError,
        "1 named but not held (ghost.weight), 0 held but not named",
    ),
    "unnamed key": (
        lambda d, i: _edit(i, lambda c: c["weight_map"].pop("half.weight")),
        ValueError,
        "0 named but not held (), 1 held but not named (half.weight)",
    ),
    "no JSON": (lambda d, i: i.write_text("{"), ValueError, "index.json is not JSON"),
    "another JSON": (lambda d, i: i.write_text("[]"), ValueError, "should hold a JSON object"),
    "no map": (lambda d, i: i.write_text("{}"), ValueError, "weight_map: key -> file expected"),
    "outside": (
        lambda d, i: _edit(i, lambda c: c["weight_map"].update(scalar="../x.safetensors")),
        ValueError,
        "'../x.safetensors' is not a file in its folder",
    ),
    "no weights": (
        lambda d, i: [p.unlink() for p in d.iterdir()],
        FileNotFoundError,
        "holds no diffusion_pytorch_model.safetensors or model.safetensors; it holds: nothing",
    ),
}


@pytest.mark.parametrize("fault", FOLDER_FAULTS)
def test_damaged_folders_are_refused(tmp_path, fault):
    write(tmp_path)
    damage, kind, message = FOLDER_FAULTS[fault]
    damage(tmp_path, tmp_path / f"{BASE}.safetensors.index.json")
    with pytest.raises(kind, match=re.escape(message)):
        folders.open_folder(tmp_path)


def test_variants_that_are_not_there(tmp_path):
    write(tmp_path, "fp16")
    with pytest.raises(FileNotFoundError, match=r"no weights without a variant.*variant='fp16'"):
        folders.open_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"of variant 'bf16'; it holds variant='fp16'"):
        folders.open_folder(tmp_path, "bf16")


def test_a_folder_of_other_things_is_not_written_to(tmp_path):
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(ValueError, match=r"not empty and not a model's folder .*thesis\.tex"):
        write(tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        write(tmp_path / "thesis.tex")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    for bad in ({"shard": 0}, {"variant": "../fp16"}):
        with pytest.raises(ValueError, match=r"max_shard_bytes|variant"):
            write(tmp_path / "new", **bad)


# --- the hub


def cached(root, name="owner--name"):
    """A repository as the hub's library keeps it."""
    repo = root / f"models--{name}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text("0" * 40)
    folder = repo / "snapshots" / ("0" * 40)
    write(folder / "unet", shard=1e9)
    return folder


def test_hub_ids_are_read_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folder = cached(tmp_path)
    assert hub.locate("owner/name", "unet") == folder / "unet"
    assert_same(values(folders.open_folder(hub.locate("owner/name", "unet"))), arrays())
    with pytest.raises(FileNotFoundError, match="no subfolder 'vae'"):
        hub.locate("owner/name", "vae")


def test_neither_folder_nor_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError) as error:
        hub.locate("owner/name")
    assert "no such folder: owner/name; and as an id it could not be fetched" in str(error.value)
    assert "HF_HUB_OFFLINE" in str(error.value)
    for path in (tmp_path / "nowhere", "./a/b/c"):
        with pytest.raises(FileNotFoundError, match=r"^no such folder: [^;]*$"):
            hub.locate(path)


def test_files_are_no_folders(tmp_path):
    for name, message in (("a.ckpt", "unpickling"), ("a.safetensors", "open_checkpoint")):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(ValueError, match=message):
            hub.locate(tmp_path / name)


REPO = [
    "model_index.json", "README.md", "v1-5.safetensors", "v1-5.ckpt", "tokenizer/merges.txt",
    "unet/config.json", f"unet/{BASE}.bin", f"unet/{BASE}.safetensors",
    f"unet/{BASE}.fp16.safetensors", f"vae/{BASE}.safetensors", "vae/config.json",
    "text_encoder/model-00001-of-00002.safetensors",
    "text_encoder/model-00001-of-00002.fp16.safetensors",
    "text_encoder/model.fp16-00001-of-00002.safetensors",
    "text_encoder/model.safetensors.index.json", "safety_checker/model.safetensors",
]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        (
            {},
            {f"unet/{BASE}.safetensors", f"vae/{BASE}.safetensors", REPO[11]},
        ),
        ({"variant": "fp16"}, {f"unet/{BASE}.fp16.safetensors", REPO[12], REPO[13]}),
        ({"weights": False}, set()),
        ({"subfolder": "unet"}, {f"unet/{BASE}.safetensors"}),
    ],
)
def test_what_is_fetched(tmp_path, monkeypatch, options, weights):
    fetched = []

    def snapshot_download(repo, revision, allow_patterns, ignore_patterns):
        assert (repo, revision) == ("owner/name", "v2")
        fetched.extend(
            huggingface_hub.utils.filter_repo_objects(
                REPO, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
            )
        )
        (tmp_path / (options.get("subfolder") or "")).mkdir(exist_ok=True)
        return tmp_path

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert Path(hub.locate("owner/name", revision="v2", **options)).is_dir()
    assert {name for name in fetched if name.endswith(".safetensors")} == weights
    assert not any(name.endswith((".bin", ".ckpt", ".md")) for name in fetched)
    others = {"unet/config.json"}
    if "subfolder" not in options:
        others |= {"model_index.json"}
    assert others <= set(fetched)
