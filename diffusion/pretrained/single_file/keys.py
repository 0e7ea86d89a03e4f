"""Name tables in the naming of the original latent-diffusion code (Rombach et al., 2022), in which
single-file checkpoints of Stable Diffusion 1, 2 and XL are kept.

Its U-Net numbers all blocks in one list downwards and one upwards; its autoencoder's attention has
1 x 1 convolutions; OpenCLIP's text encoder keeps queries, keys and values in one matrix.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from diffusion.models.autoencoder import AutoencoderKL
from diffusion.models.clip import ClipText
from diffusion.models.controlnet import ControlNet
from diffusion.models.fields import per_level
from diffusion.models.t2i_adapter import T2IAdapter
from diffusion.models.unet import UNet
from diffusion.models.unet_encoder import Encoder
from diffusion.pretrained.names import PLAIN, POINTWISE, Names, Row, dotted, substituted, unfused

RESNET = (
    (r"\.norm1$", ".in_layers.0"),
    (r"\.conv1$", ".in_layers.2"),
    (r"\.time_emb_proj$", ".emb_layers.1"),
    (r"\.norm2$", ".out_layers.0"),
    (r"\.conv2$", ".out_layers.3"),
    (r"\.conv_shortcut$", ".skip_connection"),
)
UNET = (
    (r"^conv_in$", "input_blocks.0.0"),
    (r"^conv_norm_out$", "out.0"),
    (r"^conv_out$", "out.2"),
    (r"^time_embedding\.linear_1$", "time_embed.0"),
    (r"^time_embedding\.linear_2$", "time_embed.2"),
    (r"^add_embedding\.linear_1$", "label_emb.0.0"),
    (r"^add_embedding\.linear_2$", "label_emb.0.2"),
    (r"^class_embedding$", "label_emb"),
    (r"^mid_block\.resnets\.0\b", "middle_block.0"),
    (r"^mid_block\.attentions\.0\b", "middle_block.1"),
    (r"^mid_block\.resnets\.1\b", "middle_block.2"),
)


def unet(net: UNet, prefix: str) -> Names:
    """The table of a ``UNet`` that the original code has."""
    if net.guidance_width is not None:
        raise ValueError(
            f"guidance_width={net.guidance_width}: the original naming has no guidance embedding"
        )
    if net.scale_shift or net.resnet_resampling or not net.mid_attention:
        raise ValueError(
            "only the U-Nets of Stable Diffusion have an original naming: without scale_shift and "
            "resnet_resampling, with mid_attention"
        )
    levels = range(len(net.widths))
    pairs, index = [], 0
    for i, level in enumerate(reversed(levels)):
        for j in range(per_level(net.blocks, level) + 1):
            pairs.append((rf"^up_blocks\.{i}\.resnets\.{j}\b", f"output_blocks.{index}.0"))
            pairs.append((rf"^up_blocks\.{i}\.attentions\.{j}\b", f"output_blocks.{index}.1"))
            index += 1
        attends = bool(per_level(net.attention, level))
        last = f"output_blocks.{index - 1}.{1 + attends}.conv"
        pairs.append((rf"^up_blocks\.{i}\.upsamplers\.0\.conv$", last))
    return Names(_encoder(net, prefix, pairs))


def controlnet(net: ControlNet, prefix: str) -> Names:
    """The table of a ``ControlNet`` for a U-Net that the original code has."""
    last = 2 * len(net.hint_widths)
    pairs = [
        (r"^controlnet_cond_embedding\.conv_in$", "input_hint_block.0"),
        (r"^controlnet_cond_embedding\.conv_out$", f"input_hint_block.{2 * last - 2}"),
        *(
            (rf"^controlnet_cond_embedding\.blocks\.{i}$", f"input_hint_block.{2 * i + 2}")
            for i in range(last - 2)
        ),
        (r"^controlnet_down_blocks\.(\d+)$", r"zero_convs.\1.0"),
        (r"^controlnet_mid_block$", "middle_block_out.0"),
    ]
    return Names(_encoder(net, prefix, pairs))


def t2i_adapter(net: T2IAdapter) -> Names:
    """The table of a ``T2IAdapter`` in its authors' code, which counts all residual blocks in one
    list, or, of the light kind, the stages."""
    if net.bottleneck:
        return Names(_prefixed("", substituted((r"\.resnets\.", ".body."))))
    rule = dotted()

    def numbered(block: re.Match) -> str:
        return f"body.{int(block[1]) * net.blocks + int(block[2] or 0)}."

    block = r"^body\.(\d+)\.(?:resnets\.(\d+)\.)?"
    return Names(lambda path: re.sub(block, numbered, rule(path)))


def _encoder(net: Encoder, prefix: str, pairs: Sequence[tuple[str, str]]) -> Callable[[str], str]:
    """The rule for the half that U-Net and ControlNet share, and, by ``pairs``, for the rest."""
    pairs, index = [*UNET, *pairs], 1
    for i in range(len(net.widths)):
        for j in range(per_level(net.blocks, i)):
            pairs.append((rf"^down_blocks\.{i}\.resnets\.{j}\b", f"input_blocks.{index}.0"))
            pairs.append((rf"^down_blocks\.{i}\.attentions\.{j}\b", f"input_blocks.{index}.1"))
            index += 1
        pairs.append((rf"^down_blocks\.{i}\.downsamplers\.0\.conv$", f"input_blocks.{index}.0.op"))
        index += 1
    blocks, resnet, dots = substituted(*pairs), substituted(*RESNET), dotted("linear_1", "linear_2")

    def rename(path: str) -> str:
        key = dots(path)
        return prefix + (resnet(blocks(key)) if ".resnets." in key else blocks(key))

    return rename


def autoencoder(net: AutoencoderKL, prefix: str) -> Names:
    """The table of an ``AutoencoderKL`` with attention in the middle alone."""
    if any(net.attention) if isinstance(net.attention, tuple) else net.attention:
        raise ValueError(
            f"attention={net.attention}: only autoencoders with attention in the middle alone have "
            "an original naming"
        )
    last = len(net.widths) - 1
    pairs = [
        (r"\bmid_block\.resnets\.0\b", "mid.block_1"),
        (r"\bmid_block\.resnets\.1\b", "mid.block_2"),
        (r"\bmid_block\.attentions\.0\b", "mid.attn_1"),
        (r"\.conv_norm_out$", ".norm_out"),
        (r"\.conv_shortcut$", ".nin_shortcut"),
        (r"\.group_norm$", ".norm"),
        (r"\.to_([qkv])$", r".\1"),
        (r"\.to_out\.0$", ".proj_out"),
        (r"\bdown_blocks\.", "down."),
        *((rf"\bup_blocks\.{i}\.", f"up.{last - i}.") for i in range(last + 1)),
        (r"\.resnets\.", ".block."),
        (r"\.attentions\.", ".attn."),
        (r"\.downsamplers\.0\.", ".downsample."),
        (r"\.upsamplers\.0\.", ".upsample."),
    ]
    parts = (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out_0", "proj_out"))
    rows = []
    for half in ("encoder", "decoder"):
        for part, name in parts:
            ours = f"{half}/mid_block/attentions_0/{part}/kernel"
            rows.append(Row((ours,), (f"{prefix}{half}.mid.attn_1.{name}.weight",), POINTWISE))
    return Names(_prefixed(prefix, substituted(*pairs)), tuple(rows))


def clip(net: ClipText, prefix: str) -> Names:
    """The table of OpenAI's text encoder, which transformers' naming serves, below a prefix."""
    if net.projection is not None:
        raise ValueError("projection: OpenAI's text encoder has none in single files")
    rule = dotted()
    return Names(
        lambda path: f"{prefix}text_model.{rule(path)}",
        aliases=((rf"^{re.escape(prefix)}(?!text_model\.)", f"{prefix}text_model."),),
        ignored=rf"{re.escape(prefix)}text_model\.embeddings\.position_ids",
    )


def open_clip(net: ClipText, prefix: str) -> Names:
    """The table of OpenCLIP's text encoder.

    Stable Diffusion 2 uses all layers but the last, and no projection: what files hold of them is
    passed over, and not written.
    """
    pairs = (
        (r"^encoder\.layers\.", "transformer.resblocks."),
        (r"\.layer_norm(\d)$", r".ln_\1"),
        (r"\.self_attn\.", ".attn."),
        (r"\.fc1$", ".c_fc"),
        (r"\.fc2$", ".c_proj"),
        (r"^final_layer_norm$", "ln_final"),
        (r"^embeddings\.token_embedding$", "token_embedding"),
    )
    positions = "embeddings/position_embedding/embedding"
    rows = [
        Row((positions,), (f"{prefix}positional_embedding",), PLAIN),
        # [width, projection] there, as here.
        Row(("text_projection/kernel",), (f"{prefix}text_projection",), PLAIN),
    ]
    for leaf, theirs in (("kernel", "weight"), ("bias", "bias")):
        first, *others = (f"self_attn/{part}_proj/{leaf}" for part in "qkv")
        ours = (rf"encoder/layers_(\d+)/{first}", *(rf"encoder/layers_\1/{k}" for k in others))
        joined = rf"{prefix}transformer.resblocks.\1.attn.in_proj_{theirs}"
        rows.append(Row(ours, (joined,), unfused(3)))
    unused = [r"logit_scale", r"attn_mask"]
    if net.projection is None:
        unused += ["text_projection", rf"transformer\.resblocks\.{net.depth}\..*"]
    return Names(
        _prefixed(prefix, substituted(*pairs)),
        tuple(rows),
        ignored=rf"{re.escape(prefix)}(?:{'|'.join(unused)})",
    )


def _prefixed(prefix: str, substitute: Callable[[str], str]) -> Callable[[str], str]:
    rule = dotted()
    return lambda path: prefix + substitute(rule(path))
