"""The fields of a ``config.json``: each is used, has a supported value, or changes nothing."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

_TRANSFORMERS = """
    add_cross_attention architectures bad_words_ids begin_suppress_tokens bos_token_id
    chunk_size_feed_forward classifier_dropout cross_attention_hidden_size decoder_start_token_id
    diversity_penalty do_sample dropout attention_dropout dtype early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id gradient_checkpointing id2label initializer_factor
    initializer_range is_encoder_decoder label2id length_penalty max_length min_length model_type
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
    output_hidden_states output_past output_scores pad_token_id prefix problem_type
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
    suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder
    tie_last_hidden_states tie_word_embeddings tokenizer_class top_k top_p torch_dtype torchscript
    transformers_version typical_p use_bfloat16 use_cache
"""
TRANSFORMERS = tuple(_TRANSFORMERS.split())
"""Fields of all classes of transformers that do not change an encoder's output at inference."""
TRANSFORMERS_SUPPORTED = {
    "is_decoder": (False,),
    "per_layer_config": (None,),
    "pruned_heads": ({}, None),
    "use_attention_mask": (False, None),
}


Table = Mapping[str, tuple[str, Any]]
"""Our field -> (the same field in a ``config.json``, its default there)."""


def defaults(table: Table) -> dict[str, Any]:
    """The ``config.json`` fields of a table, with their defaults."""
    return dict(table.values())


def ours(table: Table, c: SimpleNamespace) -> dict[str, Any]:
    """Our fields of a table, from the values that ``fields`` has read."""
    return {name: getattr(c, theirs) for name, (theirs, _) in table.items()}


def theirs(table: Table, net: Any) -> dict[str, Any]:
    """The ``config.json`` fields of a table, from a network of ours; tuples become lists."""
    values = {name: getattr(net, own) for own, (name, _) in table.items()}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def architecture(config: Mapping[str, Any], supported: Collection[str]) -> str:
    """The class of a ``config.json``: ``_class_name``, or else the first of ``architectures``."""
    listed = config.get("architectures") or [None]
    name = config.get("_class_name", listed[0])
    if not isinstance(name, str) or name not in supported:
        field = "_class_name" if "_class_name" in config else "architectures"
        raise ValueError(f"{field}={config.get(field)!r}: expected one of {', '.join(supported)}")
    return name


def fields(
    config: Mapping[str, Any],
    what: str,
    defaults: Mapping[str, Any],
    supported: Mapping[str, Collection[Any]],
    harmless: Collection[str] = (),
) -> SimpleNamespace:
    """The values of the fields in ``defaults``, lists as tuples.

    Args:
      config: as in the file; fields whose names start with "_" do not describe the network.
      what: the class's name, for errors.
      defaults: the fields that are used, with the class's defaults.
      supported: the legal values of some fields, used or not; the first is the default.
      harmless: other fields, which do not change the output.

    Raises:
      ValueError: for an unknown field or an unsupported value.
    """
    known = {*defaults, *supported, *harmless}
    for field, value in config.items():
        if not field.startswith("_") and field not in known:
            near = get_close_matches(field, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{field}={value!r}: {what} has no such field{hint}")
    for field, legal in supported.items():
        value = _frozen(config.get(field, defaults.get(field, next(iter(legal)))))
        if value not in legal:
            choices = ", ".join(map(repr, legal))
            raise ValueError(f"{field}={value!r}: {what} is supported with {choices}")
    used = {field: config.get(field, default) for field, default in defaults.items()}
    for field, value in used.items():
        check(field, value, defaults[field], what)
    return SimpleNamespace(**{field: _frozen(value) for field, value in used.items()})


def side(c: SimpleNamespace, field: str, what: str) -> Any:
    """A field that is one number, or a list of equal ones, as one number."""
    value = getattr(c, field)
    sides = set(value) if isinstance(value, tuple) else {value}
    if len(sides) != 1:
        raise ValueError(f"{field}={value}: {what} is supported with squares")
    return sides.pop()


def kinds(c: SimpleNamespace, field: str, what: str, classes: Mapping[Any, str]) -> list[Any]:
    """The kinds of a list of blocks, from the table kind -> the class of such a block."""
    known = {name: kind for kind, name in classes.items()}
    for name in getattr(c, field):
        if name not in known:
            raise ValueError(f"{field}: {what} supports {', '.join(known)}, got {name!r}")
    return [known[name] for name in getattr(c, field)]


def array(*shape: int, dtype: DTypeLike = jnp.float32) -> jax.ShapeDtypeStruct:
    """The shape of an argument of a network, with a batch of 1."""
    return jax.ShapeDtypeStruct((1, *shape), dtype)


def check(field: str, value: Any, default: Any, what: str) -> None:
    """Raises ValueError for a value of another type than the default's, or of an absurd size."""
    entries = value if isinstance(value, (list, tuple)) else [value]
    known = default[:1] if isinstance(default, (list, tuple)) else [default]
    if len(entries) > MOST or (isinstance(default, str) and isinstance(value, (list, tuple))):
        raise ValueError(f"{field}={value!r:.200}: {what} takes no such list")
    limit = MOST if "layers" in field or "depth" in field else LARGEST
    for entry in entries:
        if isinstance(entry, (list, tuple)):
            check(field, entry, default, what)
            continue
        number = isinstance(entry, (int, float)) and not isinstance(entry, bool)
        if number and not (abs(entry) <= limit and (entry >= 0 or isinstance(entry, float))):
            raise ValueError(f"{field}={value!r:.200}: {what} takes numbers from 0 to {limit:,}")
        for usual in known:
            kinds = _kinds(usual)
            # Files have 0.0 for 0 too.
            whole = kinds == (int,) and isinstance(entry, float) and entry.is_integer()
            if entry is not None and kinds and not isinstance(entry, kinds) and not whole:
                raise ValueError(
                    f"{field}={value!r:.200} has the wrong type; {what} takes {kinds[-1].__name__},"
                    f" such as {usual!r}"
                )
            if kinds and bool not in kinds and isinstance(entry, bool):
                raise ValueError(f"{field}={value!r}: {what} takes a {kinds[-1].__name__}")


MOST = 64
"""Entries of a list, and layers."""
LARGEST = 10**8


def _kinds(default: Any) -> tuple[type, ...]:
    """The types of values that a default stands for; () for all."""
    for kinds in ((bool,), (int,), (int, float), (str,)):
        if isinstance(default, kinds[-1]):
            return kinds
    return ()


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, (list, tuple)) else value
