"""Image sets of TensorFlow Datasets, read and prepared without TensorFlow.

Any set that TFDS has prepared in the ``array_record`` format is read by its name. ``prepare``
makes such a set from images of your own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib.util
import io
import re
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffusion.data import images
from diffusion.data.image_source import from_pictures, named
from diffusion.data.sources import Pictures, Source

HELD_OUT = ("test", "validation", "val")
CAPTIONS = ("caption", "text")
VERSION = "1.0.0"


class NotPreparedError(FileNotFoundError):
    """A set that TFDS knows is not prepared; the message explains how to prepare it."""


def source(
    name: str,
    split: str,
    data_dir: str | Path | None = None,
    *,
    held_out: float = 0.05,
    known: tuple[str, ...] = (),
) -> Source:
    """A prepared set by name.

    The feature ``image`` becomes ``x`` in [-1, 1], ``label`` stays, and ``caption`` or ``text``
    become captions. If the images have several sizes, the shape is (0, 0, C), and only ``pictures``
    can be used.

    Args:
      name: in TFDS's notation, "mnist" or "imagenet_resized/64x64".
      split: ``train``; ``test`` (or else ``validation``, or else the share ``held_out`` of
        ``train``); or any split in TFDS's notation (``train[:90%]``).
      data_dir: TFDS's folder; None for its default.
      known: other names that a user may mean; for the error message.
    """
    builder = _builder(name, data_dir, known)
    examples = _open(builder, name, split, data_dir, held_out)
    features = builder.info.features
    if "image" not in features:
        raise ValueError(f"{name} has no feature 'image', only {', '.join(features)}")
    columns, count, names = {}, 0, ()
    if "label" in features:
        columns["label"] = _Column(examples, "label")
        count, names = features["label"].num_classes, tuple(features["label"].names)
    at = partial("{}, {}, example {}".format, name, split)
    pictures = Pictures(len(examples), partial(_image, examples), at, columns)
    shape = tuple(side or 0 for side in features["image"].shape)
    if 0 in shape[:2] or shape[2] not in (1, 3):
        shape = (0, 0, 1 if shape[2] == 1 else 3)
    made = from_pictures(name, pictures, shape, class_names=names, num_classes=count)
    key = next((key for key in CAPTIONS if _is(features, key, "Text")), None)
    if key:
        texts = (examples[i][key] for i in range(len(examples)))
        captions = tuple(text.decode() if isinstance(text, bytes) else text for text in texts)
        made = dataclasses.replace(made, captions=captions)
    return made


def prepare(name: str, data_dir: str | Path, splits: Mapping[str, Source], channels: int) -> Path:
    """Writes a TFDS set of your own to ``data_dir/name/1.0.0``; ``source`` reads it by its name.

    JPEGs and PNGs are copied, unless they are transparent, rotated or of an unusual mode; all other
    images are stored as PNGs, with 1 or 3 channels. Every image is decoded once, so that no damaged
    one gets in. ``splits`` are the sources of the set's splits. Returns the folder of the set.
    """
    import tensorflow_datasets
    from tensorflow_datasets.core.dataset_builders import adhoc_builder

    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(
            f"{name!r} cannot be the name of a set: expected small letters, digits and "
            "underscores, a letter first"
        )
    if (path := Path(data_dir, name, VERSION)).exists():
        raise ValueError(f"{path} exists already; choose another name, or delete it")
    first = next(iter(splits.values()))
    if first.pictures is None and (len(first.shape) != 3 or first.levels != 256):
        what = "no images" if len(first.shape) != 3 else "images of floats"
        raise ValueError(f"{first.name} has {what}; expected images of 8 bits")
    feature = tensorflow_datasets.features
    features = {"image": feature.Image(shape=(None, None, channels)), "name": feature.Text()}
    if first.num_classes:
        names = first.class_names or tuple(str(k) for k in range(first.num_classes))
        features["label"] = feature.ClassLabel(names=list(names))
    if first.captions:
        features["caption"] = feature.Text()

    class Builder(adhoc_builder.AdhocBuilder, skip_registration=True):
        """Generates examples without TensorFlow, which the base class needs for it."""

        def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
            del dl_manager
            return {split: _examples(s, channels) for split, s in self._split_datasets.items()}

    builder = Builder(
        name=name,
        version=VERSION,
        data_dir=str(data_dir),
        split_datasets=splits,
        features=feature.FeaturesDict(features),
        description=f"{first.name}, prepared from files.",
        file_format="array_record",
        disable_shuffling=True,
    )
    if not sys.stderr.isatty():
        tensorflow_datasets.disable_progress_bar()
    builder.download_and_prepare()
    return Path(builder.data_path)


def _examples(source: Source, channels: int) -> Iterator[tuple[int, dict[str, Any]]]:
    pictures = source.pictures
    for i in range(len(source)):
        if pictures is None:
            batch = source.read(np.array([i]))
            x = np.round((batch["x"][0] + 1) * 127.5).astype(np.uint8)
            row = {"image": _png(images.decode(x, channels=channels)), "name": str(i)}
            label = batch.get("label")
        else:
            image = named(pictures, i, partial(_encoded, channels=channels))
            row = {"image": image, "name": pictures.name(i)}
            label = pictures.columns.get("label")
            label = None if label is None else label[np.array([i])]
        row |= {} if label is None else {"label": int(label[0])}
        yield i, row | ({"caption": source.captions[i]} if source.captions else {})


def _encoded(picture: images.Picture, channels: int) -> bytes:
    """The picture as a JPEG or PNG that all readers decode alike."""
    flat = images.decode(picture, channels=channels)
    if isinstance(picture, np.ndarray):
        return _png(flat)
    data = picture if isinstance(picture, bytes) else picture.read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        plain = image.format in ("JPEG", "PNG") and images.mode(data) == flat.mode
    return data if plain else _png(flat)


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _builder(name: str, data_dir: str | Path | None, known: tuple[str, ...]) -> Any:
    import tensorflow_datasets
    from tensorflow_datasets.core import read_only_builder, registered

    options = {"data_dir": data_dir and str(data_dir), "file_format": "array_record"}
    # Prepared files come before TFDS's own definition of that name.
    for make in (read_only_builder.builder_from_files, tensorflow_datasets.builder):
        with contextlib.suppress(registered.DatasetNotFoundError):
            return make(name, **options)
    every = (*known, *registered.list_imported_builders())
    near = difflib.get_close_matches(name, every, n=1)
    raise ValueError(
        f"{name!r} is none of {', '.join(known)}, and TFDS neither knows such a set nor "
        f"finds one prepared in {data_dir or 'its folder'}."
        + (f" Did you mean {near[0]!r}?" if near else "")
    )


def _open(builder: Any, name: str, split: str, data_dir: Any, held_out: float) -> Any:
    import tensorflow_datasets

    splits = builder.info.splits
    split = _split(split, splits, held_out)
    options = {"split": split}
    if _is(builder.info.features, "image", "Image"):
        options["decoders"] = {"image": tensorflow_datasets.decode.SkipDecoding()}
    try:
        return builder.as_data_source(**options)
    except (KeyError, AssertionError, OSError) as error:
        if splits:  # it is prepared: the mistake lies elsewhere, e.g. in the split's name
            raise ValueError(f"{name}: {error}") from error
        if importlib.util.find_spec("tensorflow"):
            builder.download_and_prepare()
            return _open(builder, name, split, data_dir, held_out)
        where = "" if data_dir is None else f", data_dir={str(data_dir)!r}"
        raise NotPreparedError(
            f"{name} is not prepared in {builder.data_dir}. Preparing it needs TensorFlow, once:\n"
            f"  pip install tensorflow-cpu\n"
            f'  python -c "import tensorflow_datasets as tfds; tfds.builder({name!r}{where}, '
            f"file_format='array_record').download_and_prepare()\"\n"
            f"Afterwards it is read without TensorFlow."
        ) from error


def _split(split: str, splits: Mapping[str, Any], held_out: float) -> str:
    """A split in TFDS's notation; without a test split it is a share of the training data."""
    if split not in ("train", "test") or "train" not in splits:
        return split
    if tests := [name for name in HELD_OUT if name in splits]:
        return tests[0] if split == "test" else split
    count = splits["train"].num_examples
    kept = min(count - 1, max(1, round((1 - held_out) * count)))
    return f"train[{kept}:]" if split == "test" else f"train[:{kept}]"


def _is(features: Mapping[str, Any], key: str, kind: str) -> bool:
    import tensorflow_datasets

    kind = getattr(tensorflow_datasets.features, kind)
    return key in features and isinstance(features[key], kind)


@dataclasses.dataclass(frozen=True)
class _Column:
    """One feature of all examples, read when it is indexed."""

    examples: Any
    key: str

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        return np.asarray([self.examples[int(i)][self.key] for i in index], np.int32)


def _image(examples: Any, i: int) -> images.Picture:
    return examples[i]["image"]
