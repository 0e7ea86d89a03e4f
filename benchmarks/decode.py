"""Stable Diffusion's decoder: latents to an image, here and in diffusers.

    python benchmarks/decode.py

prints a table and writes runs/benchmarks/decode.json. As in networks.py, both sides have the same
weights and latents and take turns, and the table gives medians; 256 and 512 pixels on a CPU, 512
and 1024 on a GPU.
"""

from __future__ import annotations

import networks
import report


def main() -> None:
    parser = report.arguments(__doc__, "decode")
    arguments = parser.parse_args()
    arguments.does, arguments.apart = "forward", False
    with report.Report(arguments, networks.COLUMNS, "diffusers", "torch", "triton") as output:
        networks.measure("decoders", arguments, output)


if __name__ == "__main__":
    main()
