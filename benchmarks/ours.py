"""Our side of a case: ``worker.py`` runs it in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import workloads
from worker import host_peak, matmul_size

from diffusion import denoiser, ema, predictions, schedules
from diffusion.conditioning import Conditioning
from diffusion.denoiser import denoiser as as_denoiser
from diffusion.models.dit import stack_blocks
from diffusion.objectives import times
from diffusion.objectives.denoising import Denoising
from diffusion.pretrained.schedulers import from_diffusers
from diffusion.sampling import guidance
from diffusion.sampling.sample import image_keys, sample
from diffusion.training import optimizers, parallel
from diffusion.training.state import TrainState
from diffusion.training.step import make_train_step

LEARNING_RATE, DECAY = 1e-4, 0.999
Run = Callable[[], Any]


class Side:
    """Our side of a case; a command is built at its first use."""

    def __init__(self, case: workloads.Case):
        self.case, self.gpu = case, jax.default_backend() == "gpu"
        self.dtype = jnp.bfloat16 if self.gpu else jnp.float32
        self.inputs = {name: jnp.asarray(x) for name, x in case.inputs().items()}
        self.params: dict[Any, Any] = {}
        self.settings = case.settings
        self.texts: dict[str, Callable[[], str]] = {}  # compiled programs

    def make(self, command: str) -> Run:
        """The function of "forward", "step:remat" and so on."""
        name, _, variant = command.partition(":")
        fields = dict(self.case.variants.get(variant, {}))
        network = self.case.network.clone(dtype=self.dtype, **fields)
        return getattr(self, name)(network)

    def free(self) -> None:
        """Frees the parameters."""
        self.params.clear()

    def forward(self, network: Any) -> Run:
        """One call of the network."""
        call = jax.jit(workloads.function(network))
        params = self.given(network, self.dtype)
        inputs = self._in_dtype()
        self.texts["forward"] = lambda: call.lower(params, inputs).compile().as_text()
        return lambda: call(params, inputs)

    def step(self, network: Any) -> Run:
        """One step of ``make_train_step``."""
        objective = self.objective(network)
        optimizer = optimizers.make("adamw", LEARNING_RATE)
        averages = {"ema": ema.constant(DECAY, ramp=False)}
        devices = jax.devices()[:1]
        layout = parallel.make("pmap", devices)
        train = make_train_step(objective, optimizer, averages, devices=devices)
        params = {"network": jax.tree.map(jnp.copy, self.given(network, jnp.float32))}
        average = {"ema": jax.tree.map(jnp.copy, params)}
        state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.tx.init(params), average)
        self.free()
        kept = [parallel.place(layout, state)]
        del params, average, state
        batch = parallel.place_batch(layout, self.batch())
        key = parallel.place(layout, jax.random.key(2))
        self.texts["step"] = lambda: train.lower(kept[0], None, batch, key).compile().as_text()

        def run() -> Any:
            kept[0], metrics = train(kept[0], None, batch, key)
            return metrics["loss"]

        return run

    def bare(self, network: Any) -> Run:
        """A step as one would write it by hand, without anything of ``diffusion.training``."""
        tx = optax.adamw(LEARNING_RATE, weight_decay=0.0)
        params = jax.tree.map(jnp.copy, self.given(network, jnp.float32))
        kept = [(params, tx.init(params), jax.tree.map(jnp.copy, params))]
        del params
        self.free()
        batch, number = self.batch(), iter(range(10**9))
        table = schedule_table()

        @partial(jax.jit, donate_argnums=0)
        def train(state, batch, key):
            params, moments, average = state
            x = batch["x"]
            keys = jax.random.split(key, 3)
            index = jax.random.randint(keys[0], x.shape[:1], 0, 1000)
            noise = jax.random.normal(keys[1], x.shape)
            alpha, sigma = (a[index][:, None, None, None] for a in table)
            cond = Conditioning(**{k: v for k, v in batch.items() if k != "x"})

            def loss_fn(params):
                out = network.apply(
                    {"params": params},
                    alpha * x + sigma * noise,
                    index.astype(jnp.float32),
                    cond,
                    train=True,
                    rngs={"dropout": keys[2]},
                )
                return jnp.mean((out - noise) ** 2)

            loss, grads = jax.value_and_grad(loss_fn)(params)
            updates, moments = tx.update(grads, moments, params)
            params = optax.apply_updates(params, updates)
            average = jax.tree.map(lambda e, p: e + (1 - DECAY) * (p - e), average, params)
            return (params, moments, average), loss

        def run() -> Any:
            kept[0], loss = train(kept[0], batch, jax.random.key(next(number)))
            return loss

        return run

    def check(self, network: Any) -> Run:
        """Loss and norm of the gradient at given inputs, without dropout: the same on all sides."""
        call, params = workloads.function(network), self.given(network, jnp.float32)
        target = jnp.asarray(np.random.default_rng(3).normal(size=self.inputs["x"].shape))

        @jax.jit
        def both(params, inputs, target):
            def loss(params):
                out = call(params, inputs).astype(jnp.float32)
                return jnp.mean((out - target) ** 2)

            value, grads = jax.value_and_grad(loss)(params)
            return jnp.stack([value, optax.tree.norm(grads)])

        return lambda: both(params, self.inputs, target.astype(jnp.float32))

    def sample(self, network: Any, only_network: bool = False) -> Run:
        """The whole sampler, in one jit; see ``samplers.py``."""
        settings = self.settings
        sampler = from_diffusers(settings["scheduler"], settings["steps"])
        params = self.given(network, self.dtype)
        cond, null = self._conditionings()
        scale, steps = settings.get("scale"), settings["steps"]
        keys = image_keys(0, range(self.case.batch))
        noise = self.inputs["x"] * np.float32(sampler.solver.init)

        def apply(params: Any, x: jax.Array, time: jax.Array, cond: Conditioning) -> jax.Array:
            return network.apply({"params": params}, x, time, cond)

        @jax.jit
        def draw(params, solver, noise, cond, null):
            denoise = as_denoiser(partial(apply, params), sampler.prediction, sampler.c_noise)
            if null is None:
                denoise = guidance.conditional(denoise, cond)
            else:
                denoise = guidance.classifier_free(denoise, cond, null, scale)
            denoise = sampler.transform(denoise)
            return sample(denoise, solver, keys, self.case.shape, x_init=noise)

        bare = jax.jit(apply)
        both = cond if null is None else jax.tree.map(lambda *a: jnp.concatenate(a), cond, null)
        x = noise if null is None else jnp.concatenate([noise, noise])
        time_of = jnp.full(len(x), 500.0)

        def calls() -> Any:
            for _ in range(steps):
                out = bare(params, x, time_of, both)
            return out

        solver = jax.device_put(sampler.solver)
        return calls if only_network else lambda: draw(params, solver, noise, cond, null)

    def calls(self, network: Any) -> Run:
        """As many bare calls of the network as the sampler makes."""
        return self.sample(network, only_network=True)

    def matmul(self, _: Any) -> Run:
        """A large product of random matrices; see ``matmul_size``."""
        size = matmul_size(self.gpu)
        a, b = (jax.random.normal(jax.random.key(i), (size, size), self.dtype) for i in range(2))
        product = jax.jit(jnp.matmul)
        return lambda: product(a, b)

    def given(self, network: Any, dtype: Any) -> Any:
        """The case's weights, on the device."""
        scan = bool(getattr(network, "scan", False))
        if (scan, dtype) not in self.params:
            tree = workloads.weights(self.case.network)
            if scan:
                tree = jax.tree.map(np.asarray, stack_blocks(tree))
            self.params[scan, dtype] = jax.tree.map(lambda a: jnp.asarray(a, dtype), tree)
        return self.params[scan, dtype]

    def batch(self) -> dict[str, jax.Array]:
        """The arguments of a training step."""
        return {name: x for name, x in self.inputs.items() if name != "time"}

    def objective(self, network: Any) -> Denoising:
        """DDPM's: linear schedule, noise predicted at discrete times."""
        return Denoising(
            network=network,
            schedule=schedules.linear(),
            prediction=predictions.eps,
            c_noise=denoiser.ddpm_index,
            times=times.discrete,
        )

    def peak(self) -> int:
        """Bytes of the device's memory at most; of a CPU the process's."""
        return jax.devices()[0].memory_stats()["peak_bytes_in_use"] if self.gpu else host_peak()

    def _in_dtype(self) -> dict[str, jax.Array]:
        kept = ("label", "time", "time_ids")
        return {k: x if k in kept else x.astype(self.dtype) for k, x in self.inputs.items()}

    def _conditionings(self) -> tuple[Conditioning, Conditioning | None]:
        inputs = self._in_dtype()
        cond = Conditioning(**{k: v for k, v in inputs.items() if k not in ("x", "time")})
        if "scale" not in self.settings:
            return cond, None
        return cond, cond.replace(context=cond.context[:, ::-1])  # any other text


def wait(output: Any) -> None:
    """Waits until the output is computed."""
    jax.block_until_ready(output)


def to_numpy(output: Any) -> np.ndarray:
    """An output in the layout that both sides compare."""
    return np.asarray(output, np.float32)


def schedule_table() -> tuple[jax.Array, jax.Array]:
    """alpha and sigma [1000] of DDPM's linear schedule."""
    kept = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    return jnp.asarray(kept**0.5, jnp.float32), jnp.asarray((1 - kept) ** 0.5, jnp.float32)
