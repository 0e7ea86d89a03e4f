"""A CLIP tokenizer of 1000 tokens, made here: of the kind that pipelines' folders have."""

from itertools import product
from string import ascii_lowercase

from diffusion.pipelines.tokenizers import clip_tokenizer

VOCAB = 1000
WORDS = (
    "a an the of on in at with and photo painting cat dog house horse red green blue small big "
    "night river mountain sitting running ugly blurry"
)


def tiny_tokenizer(folder=None, pad="<|endoftext|>", length=77):
    """The tokenizer, also written to ``folder`` where one is given; ``pad="!"`` as in SD 2.

    The words above are one token each, other words several: two letters a token, or one.
    """
    merges = {}
    for word in WORDS.split():
        letters = [*word[:-1], word[-1] + "</w>"]
        while len(letters) > 1:
            merges[f"{letters[0]} {letters[1]}"] = None
            letters[:2] = [letters[0] + letters[1]]
    merges |= dict.fromkeys(map(" ".join, product(ascii_lowercase, ascii_lowercase)))
    tokenizer = clip_tokenizer(merges, vocab_size=VOCAB, length=length, pad=pad)
    if folder is not None:
        tokenizer.save_pretrained(folder)
    return tokenizer
