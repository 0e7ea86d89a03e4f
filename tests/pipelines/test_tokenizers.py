"""Tokenizers from folders and from CLIP's merges."""

import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT
from tiny_tokenizer import VOCAB, tiny_tokenizer

from diffusion.pipelines.tokenizers import clip_tokenizer, load_tokenizer

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"
MERGES = REAL / "tokenizer" / "bpe_simple_vocab_16e6.txt.gz"


def test_ids_are_clips():
    if not MERGES.exists():
        pytest.skip(f"needs {MERGES.name}, CLIP's merges")
    tokenizer = clip_tokenizer(MERGES)
    text = "A photo of an astronaut riding a horse on Mars"
    # As the published ViT-L/14's tokenizer has them.
    expected = [49406, 320, 1125, 539, 550, 18376, 6765, 320, 4558, 525, 7496, 49407]
    assert len(tokenizer) == 49408
    assert tokenizer(text).input_ids == expected
    assert tokenizer("!").input_ids[1] == 256  # with the end of the word
    second = clip_tokenizer(MERGES, pad="!")
    assert second("cat", padding="max_length").input_ids == [49406, 2368, 49407] + [0] * 74


def test_what_is_written_is_read(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path, pad="!")
    again = load_tokenizer(tmp_path)
    text = "A photo of a   CAT: wörld, 你好 isn't it?"
    ids = tokenizer(text, padding="max_length").input_ids
    assert again(text, padding="max_length").input_ids == ids
    assert again.model_max_length == len(ids) == 77
    assert (ids[0], max(ids), ids[-1]) == (VOCAB - 2, VOCAB - 1, 0)
    assert tokenizer.decode(ids[1:4]) == "a photo of"


def test_a_smaller_vocabulary_says_the_same():
    merges = ["c a", "ca t</w>", "t h"]
    tokenizer = clip_tokenizer(merges, vocab_size=514 + 2)
    assert tokenizer.convert_ids_to_tokens(tokenizer("cat th").input_ids) == [
        "<|startoftext|>", "cat</w>", "t", "h</w>", "<|endoftext|>",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="vocab_size=600; expected 514 to 517, from 3 merges"):
        clip_tokenizer(merges, vocab_size=600)


def test_a_folder_without_a_tokenizer(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no tokenizer in .*found \['vocab.json'\]"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        load_tokenizer(tmp_path / "tokenizer")


def test_no_word_of_a_missing_pytorch():
    """transformers looks for it as it is imported, and tokenizers do not need it."""
    code = (
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest)\n"
        "from diffusion.pipelines import tokenizers; import transformers"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "PyTorch" not in done.stderr + done.stdout, done.stderr
