"""--mode=prepare: a TFDS set of one's own images."""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from diffusion.config import ranges
from diffusion.config.data import stored
from diffusion.data import tfds
from diffusion.errors import field


def run(config: ConfigDict, workdir: str) -> None:
    """Writes the images of config.data as a TFDS set: that of ``workdir``'s name, in its parent.

    It is read by that name: ``--workdir=sets/flowers`` by ``--config.data.name=flowers
    --config.data.dir=sets``. Images keep their sizes. With config.data.on_error=skip damaged ones
    are left out.
    """
    ranges.check(config)
    folder, c = Path(workdir), config.data
    splits = {split: stored(c, split) for split in ("train", "test")}
    with field(f"--workdir={workdir}"):
        tfds.prepare(folder.name, folder.parent, splits, c.channels or splits["train"].shape[-1])
    examples = " and ".join(f"{len(source):,} ({split})" for split, source in splits.items())
    print(
        f"{examples} images in {folder}; read by --config.data.name={folder.name} "
        f"--config.data.dir={folder.parent}"
    )
