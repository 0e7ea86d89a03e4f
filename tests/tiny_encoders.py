"""Small torch text and image encoders with random parameters; not even norms are at their start."""

import torch
from tiny_tokenizer import VOCAB
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    T5Config,
    T5EncoderModel,
)

TEXT = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=2,
    projection_dim=24,
    bos_token_id=VOCAB - 2,
    eos_token_id=2,  # as in the published pipelines: the end is then the largest id
)
VISION = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    projection_dim=24,
    image_size=24,
    patch_size=8,
)
DINOV2 = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    mlp_ratio=2,
    image_size=24,
    patch_size=8,
)
BERT = dict(
    vocab_size=VOCAB,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=40,
    max_position_embeddings=80,
)
T5 = dict(
    vocab_size=100,
    d_model=32,
    d_kv=12,
    d_ff=40,
    num_layers=2,
    num_heads=3,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=12,
)


def randomise(model, seed=0):
    """Draws all parameters: matrices by their width, norms about 1, biases about 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_(noise / (1 if "embed" in name else p[0].numel() ** 0.5))
            else:
                p.copy_(0.3 * noise + ("norm" in name and name.endswith("weight")))
    return model.eval()


def clip_text(seed=0, projection=False, **changes):
    """A text encoder for ``tiny_tokenizer``; SDXL's second one has a projection."""
    cls = CLIPTextModelWithProjection if projection else CLIPTextModel
    return randomise(cls(CLIPTextConfig(**{**TEXT, **changes})), seed)


def clip_vision(seed=0, **changes):
    """An image encoder with projection."""
    return randomise(CLIPVisionModelWithProjection(CLIPVisionConfig(**{**VISION, **changes})), seed)


def dinov2(seed=0, **changes):
    """An image encoder without text."""
    return randomise(Dinov2Model(Dinov2Config(**{**DINOV2, **changes})), seed)


def t5(seed=0, **changes):
    """A T5 encoder."""
    return randomise(T5EncoderModel(T5Config(**{**T5, **changes})), seed)
