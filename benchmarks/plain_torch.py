"""configs/digits.py as a plain PyTorch script: the same network, batch, optimiser and sampler.

    python benchmarks/plain_torch.py train weights.pt
    python benchmarks/plain_torch.py sample weights.pt digits.png

``cold.py`` starts it beside main.py; with --compile the network is compiled.
"""

from __future__ import annotations

import argparse
import sys

import diffusers
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["train", "sample"])
    parser.add_argument("weights", help="written by train, read by sample")
    parser.add_argument("image", nargs="?", default="digits.png")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
        norm_num_groups=8,
        num_class_embeds=11,
    ).to(device)
    call = torch.compile(network) if arguments.compile else network
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"
    )
    if arguments.what == "train":
        train(network, call, scheduler, arguments.steps, device)
        torch.save(network.state_dict(), arguments.weights)
    else:
        network.load_state_dict(torch.load(arguments.weights))
        sample(call, scheduler, arguments.count, arguments.image, device)


def train(network, call, scheduler, steps: int, device: str) -> None:
    """Trains that number of steps on the digits."""
    digits = load_digits()
    images = torch.tensor(digits.images[:, None] / 8 - 1, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    average = [p.detach().clone() for p in network.parameters()]
    kept = scheduler.alphas_cumprod.to(device)
    for step in range(steps):
        index = torch.randint(0, len(images), (64,))
        x, label = images[index].to(device), labels[index].to(device)
        label = torch.where(torch.rand(64, device=device) < 0.1, 10, label)
        t = torch.randint(0, 1000, (64,), device=device)
        noise = torch.randn_like(x)
        alpha, sigma = (a.sqrt()[:, None, None, None] for a in (kept[t], 1 - kept[t]))
        out = call(alpha * x + sigma * noise, t, class_labels=label, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(out, alpha * noise - sigma * x)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(average, list(network.parameters()), 0.001)
        if step == 0:
            print(f"first step: loss {loss.item():.4f}", flush=True)


@torch.no_grad()
def sample(call, scheduler, count: int, path: str, device: str) -> None:
    """Guided samples in a row of 8 x 8 images."""
    scheduler.set_timesteps(20, device=device)
    x = torch.randn(count, 1, 8, 8, device=device)
    label = torch.arange(count, device=device) % 10
    both = torch.cat([torch.full_like(label, 10), label])
    for t in scheduler.timesteps:
        out = call(torch.cat([x, x]), t, class_labels=both, return_dict=False)[0]
        null, with_label = out.chunk(2)
        x = scheduler.step(null + 1.5 * (with_label - null), t, x, return_dict=False)[0]
    row = x[:, 0].permute(1, 0, 2).reshape(8, -1).clamp(-1, 1).cpu().numpy()
    Image.fromarray(np.uint8(255 * (row + 1) / 2)).save(path)
    print("image", flush=True)


if __name__ == "__main__":
    sys.exit(main())
