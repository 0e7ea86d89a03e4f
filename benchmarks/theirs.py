"""The side of diffusers and PyTorch of a case: ``worker.py`` runs it in a process of its own.

Variants: "eager", "channels_last" (eager, too) and "compile"; compiled networks are channels_last
where they have convolutions. On a GPU all are bfloat16 and channels_last, projections of queries,
keys and values are fused where diffusers can, and "compile" is max-autotune with CUDA graphs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import diffusers
import numpy as np
import torch
import torch._inductor.config as inductor
import workloads
from worker import host_peak, matmul_size

from diffusion.models.dit import DiT
from diffusion.pretrained import models
from diffusion.pretrained.names import to_tensors

LEARNING_RATE, DECAY = 1e-4, 0.999
Run = Callable[[], Any]


class Side:
    """diffusers' side of a case; a command is built at its first use."""

    def __init__(self, case: workloads.Case):
        diffusers.utils.logging.set_verbosity_error()
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.case, self.gpu = case, torch.cuda.is_available()
        self.settings = case.settings
        self.device = "cuda" if self.gpu else "cpu"
        self.dtype = torch.bfloat16 if self.gpu else torch.float32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
        self.inputs = {name: self.tensor(x) for name, x in case.inputs().items()}
        self.state: dict[str, torch.Tensor] | None = None
        self.kept: dict[str, Callable] = {}  # networks that several commands share

    def make(self, command: str) -> Run:
        """The function of "forward:eager", "step:compile" and so on."""
        name, _, variant = command.partition(":")
        return getattr(self, name)(variant)

    def free(self) -> None:
        """Frees the weights from which networks are built, and the cache."""
        self.state = None
        self.kept.clear()
        if self.gpu:
            torch.cuda.empty_cache()

    def forward(self, variant: str) -> Run:
        """One call of the network; of an autoencoder, its decoder."""
        network = self.network(variant).to(self.dtype).eval()
        call = self.compiled(self.call(network), variant)
        inputs = self._in_dtype()

        def run() -> torch.Tensor:
            with torch.inference_mode() if variant != "compile" else torch.no_grad():
                return call(inputs)

        return run

    def step(self, variant: str) -> Run:
        """Loss, gradients, fused AdamW and average."""
        network = self.network(variant).train()
        parameters = list(network.parameters())
        optimizer = torch.optim.AdamW(
            parameters, lr=LEARNING_RATE, eps=1e-8, weight_decay=0.0, fused=True
        )
        average = [p.detach().clone() for p in parameters]
        alpha, sigma = (self.tensor(a) for a in schedule_table())
        call = self.call(network)
        batch, x = self.inputs, self.inputs["x"]
        generator = torch.Generator(self.device).manual_seed(2)

        def loss_of(x_t: torch.Tensor, time: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
            with torch.autocast(self.device, torch.bfloat16) if self.gpu else nullcontext():
                out = call(batch | {"x": x_t, "time": time})
            return torch.nn.functional.mse_loss(out.float()[:, : x.shape[1]], noise)

        compiled = self.compiled(loss_of, variant)

        def run() -> torch.Tensor:
            index = torch.randint(0, 1000, x.shape[:1], device=self.device, generator=generator)
            noise = torch.randn(x.shape, device=self.device, generator=generator)
            a, s = alpha[index][:, None, None, None], sigma[index][:, None, None, None]
            x_t = (a * x + s * noise).contiguous(memory_format=self.format(variant))
            loss = compiled(x_t, index.float(), noise)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                torch._foreach_lerp_(average, parameters, 1 - DECAY)
            return loss.detach()

        return run

    def check(self, variant: str) -> Run:
        """Loss and norm of the gradient at given inputs, without dropout."""
        network = self.network("eager").eval()
        call = self.call(network)
        target = np.random.default_rng(3).normal(size=self.case.inputs()["x"].shape)
        target = self.tensor(target.astype(np.float32))

        def run() -> torch.Tensor:
            with torch.autocast(self.device, torch.bfloat16) if self.gpu else nullcontext():
                out = call(self.inputs)
            loss = torch.nn.functional.mse_loss(out.float(), target)
            grads = torch.autograd.grad(loss, list(network.parameters()))
            if isinstance(self.case.network, DiT):
                grads = _joined(network, grads)
            norm = torch.stack([g.float().square().sum() for g in grads]).sum().sqrt()
            return torch.stack([loss.detach(), norm])

        return run

    def sample(self, variant: str, only_network: bool = False) -> Run:
        """The loop of diffusers' pipelines, with a batch of two for guidance."""
        settings = self.settings
        config = dict(settings["scheduler"])
        scheduler = getattr(diffusers, config.pop("_class_name"))(**config)
        scheduler.set_timesteps(settings["steps"], device=self.device)
        if variant not in self.kept:
            network = self.network(variant).to(self.dtype).eval()
            self.kept[variant] = self.compiled(self.call(network), variant)
        call = self.kept[variant]
        inputs, scale = self._in_dtype(), settings.get("scale")
        noise = self.inputs["x"]
        cond = {k: v for k, v in inputs.items() if k not in ("x", "time")}
        if scale is not None:
            null = cond | {"context": cond["context"].flip(1)}
            cond = {k: torch.cat([null[k], cond[k]]) for k in cond}

        def draw() -> torch.Tensor:
            scheduler.set_timesteps(settings["steps"], device=self.device)
            x = noise * scheduler.init_noise_sigma
            for t in scheduler.timesteps:
                if variant == "compile" and self.gpu:
                    torch.compiler.cudagraph_mark_step_begin()
                model_input = x if scale is None else torch.cat([x, x])
                model_input = scheduler.scale_model_input(model_input, t).to(self.dtype)
                out = call(cond | {"x": model_input, "time": t.expand(len(model_input))})
                if scale is not None:
                    null, with_text = out.chunk(2)
                    out = null + scale * (with_text - null)
                x = scheduler.step(out, t, x, return_dict=False)[0]
            return x

        def calls() -> torch.Tensor:
            x = (noise if scale is None else torch.cat([noise, noise])).to(self.dtype)
            t = scheduler.timesteps[0].expand(len(x))
            for _ in range(len(scheduler.timesteps)):
                out = call(cond | {"x": x, "time": t})
            return out

        def run() -> torch.Tensor:
            with torch.no_grad():
                return calls() if only_network else draw()

        return run

    def calls(self, variant: str) -> Run:
        """As many bare calls of the network as the sampler makes."""
        return self.sample(variant, only_network=True)

    def matmul(self, _: str) -> Run:
        """A large product of random matrices."""
        size = matmul_size(self.gpu)
        a, b = (torch.randn(size, size, device=self.device, dtype=self.dtype) for _ in range(2))
        return lambda: a @ b

    def network(self, variant: str) -> torch.nn.Module:
        """diffusers' network with the case's weights, in float32."""
        if self.state is None:
            ours = self.case.network
            table = models._file(ours).names(ours)
            arrays = dict(to_tensors(table, workloads.weights(ours)))
            self.state = {key: torch.from_numpy(array) for key, array in arrays.items()}
        config = models.to_config(self.case.network)
        cls = getattr(diffusers, config["_class_name"])
        with torch.device("meta"):
            network = cls.from_config(config)
        network.load_state_dict(self.state, assign=True, strict=True)
        network = _without_meta(network, cls, config)
        network = network.to(self.device)
        if not self.gpu:  # the weights are also those of the networks that come after this one
            own = {key: tensor.clone() for key, tensor in network.state_dict().items()}
            network.load_state_dict(own, assign=True)
        if self.gpu and hasattr(network, "fuse_qkv_projections"):
            network.fuse_qkv_projections()
        return network.to(memory_format=self.format(variant)).requires_grad_(True)

    def call(self, network: torch.nn.Module) -> Callable[[dict[str, torch.Tensor]], torch.Tensor]:
        """inputs -> output."""
        name = type(network).__name__

        def of(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
            if name == "AutoencoderKL":
                return network.decode(inputs["x"], return_dict=False)[0]
            options: dict[str, Any] = {"return_dict": False}
            if "label" in inputs:
                options["class_labels"] = inputs["label"]
            if "context" in inputs:
                options["encoder_hidden_states"] = inputs["context"]
            if "pooled" in inputs:
                options["added_cond_kwargs"] = {
                    "text_embeds": inputs["pooled"],
                    "time_ids": inputs["time_ids"],
                }
            return network(inputs["x"], inputs["time"], **options)[0]

        return of

    def compiled(self, function: Callable, variant: str) -> Callable:
        """The function, compiled if the variant is; on a GPU with max-autotune."""
        if variant != "compile":
            return function
        if not self.gpu:
            return torch.compile(function)
        inductor.conv_1x1_as_mm = True
        inductor.epilogue_fusion = False
        mode = self.settings.get("mode", "max-autotune")
        return torch.compile(function, mode=mode, fullgraph=True)

    def format(self, variant: str) -> torch.memory_format:
        """The memory format of images."""
        convolutional = not isinstance(self.case.network, DiT)
        last = convolutional and (self.gpu or variant != "eager")
        return torch.channels_last if last else torch.contiguous_format

    def tensor(self, array: Any) -> torch.Tensor:
        """An array as a tensor on the device; images become [B, C, H, W]."""
        tensor = torch.as_tensor(np.asarray(array), device=self.device)
        tensor = tensor.long() if tensor.dtype == torch.int32 else tensor
        return tensor.permute(0, 3, 1, 2).contiguous() if tensor.ndim == 4 else tensor

    def peak(self) -> int:
        """Bytes of the device's memory at most; of a CPU the process's."""
        return torch.cuda.max_memory_allocated() if self.gpu else host_peak()

    def _in_dtype(self) -> dict[str, torch.Tensor]:
        kept = ("label", "time", "time_ids")
        return {k: x if k in kept else x.to(self.dtype) for k, x in self.inputs.items()}


def _without_meta(network: torch.nn.Module, cls: type, config: dict) -> torch.nn.Module:
    """Buffers that no file holds (positions) are computed anew."""
    missing = [name for name, buffer in network.named_buffers() if buffer.is_meta]
    if not missing:
        return network
    state = network.state_dict()
    network = cls.from_config(config)
    network.load_state_dict(state, assign=True)
    return network


def _joined(network: torch.nn.Module, grads: tuple[torch.Tensor, ...]) -> Iterator[torch.Tensor]:
    """diffusers has the embedders once per block: the gradient of ours is the sum."""
    sums: dict[str, torch.Tensor] = {}
    for (name, _), grad in zip(network.named_parameters(), grads):
        parts = name.split(".")
        key = ".".join(parts[2:]) if ".norm1.emb." in name else name
        sums[key] = sums[key] + grad if key in sums else grad
    yield from sums.values()


def wait(output: Any) -> None:
    """Waits until the output is computed."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def to_numpy(output: torch.Tensor) -> np.ndarray:
    """An output in the layout that both sides compare."""
    output = output.detach().float().cpu()
    return (output.permute(0, 2, 3, 1) if output.ndim == 4 else output).numpy()


def schedule_table() -> tuple[np.ndarray, np.ndarray]:
    """alpha and sigma [1000] of DDPM's linear schedule."""
    kept = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    return (kept**0.5).astype(np.float32), ((1 - kept) ** 0.5).astype(np.float32)
