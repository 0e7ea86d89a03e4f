"""Data and judges of adapter_demonstrations.py: what they measure with, and no adapter has seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from diffusion.conditions.edges import canny
from diffusion.data import captions
from diffusion.data.images import WHITE
from diffusion.evaluation.networks.clip import MEAN, STD

SIDE, HELD_OUT = 32, 0.05
WIDTH = 64  # of the features of both networks
PALETTE = np.array([[20, 12, 60], [120, 30, 140], [240, 120, 40], [255, 240, 180]], np.uint8)
TINTS = {"red": (0.8, 0.0, 0.0), "blue": (0.0, 0.2, 0.8)}
GREY = np.array([0.299, 0.587, 0.114])


class Items(NamedTuple):
    """Pictures [N, 32, 32, 3] uint8 and their captions."""

    images: np.ndarray
    captions: tuple[str, ...]

    def chosen(self, index: Sequence[int] | np.ndarray) -> Items:
        """Those with these numbers."""
        return Items(self.images[index], tuple(self.captions[i] for i in index))


def items(data: str) -> tuple[Items, Items]:
    """(training pictures, one picture of each held-out caption), split as the base's own."""
    parts = [captions.read(Path(data) / "emoji"), captions.tiles(Path(data) / "dcss_tiles")]
    images = np.concatenate([captions.resize(part.images, SIDE, WHITE) for part in parts])
    pairs = captions.Pairs(images, sum((part.captions for part in parts), ()))
    train, test = (Items(*captions.split(pairs, name, HELD_OUT)) for name in ("train", "test"))
    first = {caption: i for i, caption in reversed(list(enumerate(test.captions)))}
    return train, test.chosen(sorted(first.values()))


def grey(x: np.ndarray) -> np.ndarray:
    """Brightness [..., H, W], 0 to 255."""
    return x.astype(np.float64) @ GREY


def styled(x: np.ndarray) -> np.ndarray:
    """In four colours by brightness: night blue, purple, orange, pale yellow."""
    return PALETTE[(grey(x) // 64).astype(int).clip(0, 3)]


def tinted(x: np.ndarray, colour: str) -> np.ndarray:
    """In one colour, in which white stays white and black gets most of the colour."""
    g = grey(x)[..., None]
    return np.round(g + (255 - g) * np.array(TINTS[colour])).astype(np.uint8)


EDITS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "make it red": lambda x: tinted(x, "red"),
    "make it blue": lambda x: tinted(x, "blue"),
    "mirror": lambda x: x[..., ::-1, :],
    "upside down": lambda x: x[..., ::-1, :, :],
}
"""Instructions, and what they ask for."""


def colours(x: np.ndarray) -> np.ndarray:
    """Shares [N, 64] of colours: each pixel counts for the eight nearest of 4 x 4 x 4."""
    place = x.reshape(len(x), -1, 3) / 85
    near = np.clip(1 - np.abs(place[..., None] - np.arange(4)), 0, None)
    shares = np.einsum("npi,npj,npk->nijk", near[:, :, 0], near[:, :, 1], near[:, :, 2])
    return np.sqrt(shares.reshape(len(x), -1) / place.shape[1])


class StyleJudge:
    """A classifier of colours: plain pictures against styled ones, as they are and as the
    autoencoder gives them back."""

    def __init__(self, plain: Sequence[np.ndarray], in_style: Sequence[np.ndarray]):
        x = np.concatenate([colours(part) for part in (*plain, *in_style)])
        y = np.repeat([0, 1], [sum(map(len, plain)), sum(map(len, in_style))])
        self._fitted = LogisticRegression(max_iter=2000, C=100).fit(x, y)

    def share(self, x: np.ndarray) -> float:
        """Of pictures, the share that is in the style."""
        return float(self._fitted.predict(colours(x)).mean())


class _Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        sides = ((3, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2))
        blocks = [
            nn.Sequential(nn.Conv2d(a, b, 3, stride, 1), nn.GroupNorm(8, b), nn.GELU())
            for a, b, stride in sides
        ]
        self.net = nn.Sequential(*blocks, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(2048, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class _Transformer(nn.Module):
    """What CLIP's image encoder is, small; takes pictures in [-1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        size = {"hidden_size": 96, "intermediate_size": 192, "projection_dim": WIDTH}
        layers = {"num_hidden_layers": 4, "num_attention_heads": 3}
        config = CLIPVisionConfig(image_size=SIDE, patch_size=4, **size, **layers)
        self.clip = CLIPVisionModelWithProjection(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
        return self.clip(((x + 1) / 2 - mean) / std).image_embeds


def as_tensor(x: np.ndarray) -> torch.Tensor:
    """uint8 [N, H, W, 3] -> [N, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.moveaxis(x.astype(np.float32) / 127.5 - 1, -1, 1).copy())


def varied(x: torch.Tensor) -> torch.Tensor:
    """Moved, scaled, mirrored, with a little other light and noise."""
    count = len(x)
    scale, shift = 0.75 + 0.4 * torch.rand(count, 1), 0.2 * (2 * torch.rand(count, 2, 1) - 1)
    mirror = torch.sign(torch.rand(count, 1) - 0.5)
    zero = torch.zeros_like(scale)
    rows = [torch.cat([scale * mirror, zero], 1), torch.cat([zero, scale], 1)]
    theta = torch.cat([torch.stack(rows, 1), shift], 2)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    light = 1 + 0.1 * torch.randn(count, 1, 1, 1) + 0.05 * torch.randn(count, 3, 1, 1)
    return x * light + 0.04 * torch.randn_like(x)


def contrasted(net: nn.Module, kinds: Sequence[np.ndarray], steps: int, seed: int) -> nn.Module:
    """Trains a network to know pictures again: two variations of one have near features, those of
    others have far ones (Chen et al., 2020). ``kinds`` are several of the same pictures."""
    torch.manual_seed(seed)
    sources = [as_tensor(kind) for kind in kinds]
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        index = torch.randint(len(kinds[0]), (96,))
        one, other = (
            F.normalize(net(varied(sources[int(torch.randint(len(sources), ()))][index])))
            for _ in range(2)
        )
        likeness = one @ other.T / 0.1
        own = torch.arange(len(index))
        loss = (F.cross_entropy(likeness, own) + F.cross_entropy(likeness.T, own)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


class Recognition:
    """Which of several pictures another one is nearest to, by a network's features.

    Args:
      net: pictures -> features.
      known: [K, H, W, 3] uint8, the pictures to choose from.
    """

    def __init__(self, net: nn.Module, known: np.ndarray):
        self._net = net
        self._known = self.features(known)

    def features(self, x: np.ndarray) -> np.ndarray:
        """[N, D] of length 1."""
        with torch.no_grad():
            return F.normalize(self._net(as_tensor(x))).numpy()

    def likeness(self, x: np.ndarray) -> np.ndarray:
        """[N, K] to the known pictures."""
        return self.features(x) @ self._known.T

    def nearest(self, x: np.ndarray, own: np.ndarray | int) -> float:
        """The share of pictures that are nearest to the known picture ``own``, a number or [N]."""
        return float((self.likeness(x).argmax(1) == own).mean())

    def rank(self, x: np.ndarray, own: np.ndarray | int) -> float:
        """The mean share of known pictures that are nearer than ``own``; 0.5 by chance."""
        near = self.likeness(x)
        own = np.broadcast_to(own, len(x))
        return float((near > near[np.arange(len(x)), own][:, None]).mean())


def encoders(folder: Path, kinds: Callable[[], Sequence[np.ndarray]], steps: int) -> nn.Module:
    """The judge's network; and the IP-Adapter's encoder, another one, in ``folder/encoder``."""
    file, judge = folder / "judge.pt", _Convolutions()
    if not file.exists():
        pictures = kinds()
        (folder / "encoder").mkdir(parents=True, exist_ok=True)
        own = contrasted(_Transformer(), pictures, steps, seed=1)
        own.clip.save_pretrained(folder / "encoder")
        torch.save(contrasted(judge, pictures, steps, seed=0).state_dict(), file)
    judge.load_state_dict(torch.load(file))
    return judge.eval()


def edges(x: np.ndarray) -> np.ndarray:
    """Canny's edges [N, H, W] bool of pictures, as the ControlNet's hints have them."""
    return np.stack([canny(one, low=100, high=200)[..., 0] > 0.5 for one in x])


def edge_f1(drawn: np.ndarray, wanted: np.ndarray, pixels: int = 1) -> float:
    """Mean F1 of edges [N, H, W]; one is met by another that is at most so many pixels away."""
    scores, square = [], np.ones((2 * pixels + 1, 2 * pixels + 1))
    for own, other in zip(drawn, wanted):
        near = [ndimage.binary_dilation(e, square) for e in (own, other)]
        hits = (own & near[1]).sum() / max(own.sum(), 1), (other & near[0]).sum() / other.sum()
        scores.append(0 if sum(hits) == 0 else 2 * hits[0] * hits[1] / sum(hits))
    return float(np.mean(scores))


def edit_seen(given: np.ndarray, drawn: np.ndarray) -> list[str]:
    """Of each picture, the instruction that explains best what became of it; "" is none.

    It is the one of ``EDITS`` whose exact result is nearest, pixel by pixel.
    """
    results = {"": given, **{name: edit(given) for name, edit in EDITS.items()}}
    away = [((drawn.astype(float) - result) ** 2).mean((1, 2, 3)) for result in results.values()]
    return [list(results)[i] for i in np.argmin(away, 0)]


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Mean correlation of the brightness of pictures."""
    pairs = [np.corrcoef(grey(x).ravel(), grey(y).ravel())[0, 1] for x, y in zip(a, b)]
    return float(np.nanmean(pairs))


def summary(values: Sequence[float]) -> str:
    """Mean and range."""
    low, mean, high = min(values), float(np.mean(values)), max(values)
    return f"{mean:.3g}" if len(values) == 1 else f"{mean:.3g} ({low:.3g} to {high:.3g})"
