"""Every field there is, with its default. A config is this with a few fields set.

Any field can be overridden on the command line: ``--config.objective.prediction=eps``. Fields
that name a component take options in parentheses, ``--config.ema="constant(decay=0.99)"``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
from ml_collections import ConfigDict, FieldReference

from diffusion.models.autoencoder import AutoencoderKL
from diffusion.models.discriminator import PatchDiscriminator
from diffusion.models.dit import DiT
from diffusion.models.mlp import MLP
from diffusion.models.unet import UNet

# Set by the builder, from the data and the other fields.
_DERIVED = {"parent", "name", "dtype", "num_classes", "null_class", "out_channels"}
_DERIVED |= {"learned_variance", "out_features"}
_DERIVED |= {"in_channels", "context_width", "added_width", "image_size", "sample_size"}
_DERIVED |= {"scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast"}


def get_config() -> ConfigDict:
    """The base configuration, which trains nothing in particular."""
    c = ConfigDict()
    c.seed = 0
    # How training lies over the devices: pmap (state whole on each) or fsdp (state cut over them)
    c.parallel = "pmap"

    c.data = ConfigDict()
    # digits, mnist, cifar10, latents, points; folder (of images: class subfolders, or captions in
    # metadata.jsonl), arrays (.npz, .npy); any TFDS name; with captions in .npz: captioned, emoji,
    # tiles, emoji_and_tiles
    c.data.name = "digits"
    c.data.dir = ""  # where the files are, or TFDS's sets; mnist and cifar10 are downloaded to it
    c.data.padding = 0  # zeros around each image (mnist)
    c.data.density = "two_moons"  # points: which density
    c.data.scale = 1.0  # latents: multiplied with this
    c.data.num_classes = 0  # latents: 0 counts the labels
    # Of folders, arrays and TFDS sets, and of captioned images:
    c.data.size = 0  # short side, resized to; 0: as they are, if all have one size
    c.data.background = (255, 255, 255)  # and laid on, where they are transparent
    c.data.held_out = 0.05  # share of images (or captions) not trained on, where no split is given
    c.data.channels = 0  # 1 (grey) or 3; 0: 3 of files, those of arrays and TFDS sets
    c.data.crop = "center"  # of what the other side has more; or random, anew in every epoch
    c.data.buckets = ""  # aspect(step=64, max_aspect=2.0): shapes of the area size^2, not squares
    c.data.on_error = "raise"  # folder: or skip, which checks all files once, and leaves out
    c.data.flip = False  # mirror images at random
    c.data.dtype = "float32"  # of batches; bfloat16: half as much to the device
    c.data.threads = 2  # that read; 0: as many as cores
    c.data.workers = 0  # processes that read, with so many threads each; 0: this one
    c.data.prefetch = 8  # batches kept ready
    c.data.tokenizer = ""  # CLIP's bpe_simple_vocab_16e6.txt.gz, or a tokenizer's folder
    c.data.tokens = 20  # longest caption, with start and end
    c.data.autoencoder = ""  # folder of one: train on its latents of the images
    c.data.text_encoder = ""  # folder of a frozen one: train on its embeddings of the captions
    c.data.cache = ""  # folder for latents and embeddings, computed once
    c.data.std = 0.5  # sigma_data of EDM's preconditioning and weighting

    c.model = ConfigDict()
    c.model.name = "unet"  # unet, dit, mlp, autoencoder: which of those below; or pretrained
    c.model.dtype = "float32"  # of the computation: float32 or bfloat16
    c.model.unet = fields(UNet)
    c.model.dit = fields(DiT, width=384, depth=12, heads=6, patch=2)
    c.model.mlp = fields(MLP)
    c.model.autoencoder = fields(AutoencoderKL)
    c.model.path = ""  # pretrained: a pipeline's folder or id on the hub
    c.model.remat = False  # pretrained: recompute blocks in the backward pass, to save memory
    c.model.text = ConfigDict()  # encoder of captions, trained with the unet or dit
    c.model.text.width = 192
    c.model.text.depth = 3
    c.model.text.heads = 3

    c.objective = ConfigDict()
    c.objective.name = "denoising"  # consistency; classification, of noised examples; autoencoding
    c.objective.schedule = "cosine"
    c.objective.prediction = "v"  # eps, x0, v, flow or edm
    c.objective.c_noise = "auto"  # ddpm_index, thousand_t, log_sigma; auto goes by the schedule
    c.objective.times = "uniform"
    c.objective.stratified = True  # spread a batch's times evenly
    c.objective.weighting = "simple"
    c.objective.distance = "l2"
    # Which noise an image is mixed with, in training: independent; optimal_transport(group=64,
    # same_label=False), handed out within groups, by default a device's share of the batch; or
    # nearest(k=4), the nearest of k. Not for samplers that draw noise (objectives/couplings.py).
    c.objective.coupling = "independent"
    c.objective.t_min = 1e-5  # smallest time trained on
    c.objective.conditional = True  # use labels or captions, where the data have them
    # Share trained without label or caption, for classifier-free guidance.
    c.objective.label_dropout = 0.1
    # How noise is drawn. offset: strength of noise that is the same in all of a channel;
    # perturbation: strength of noise in the input that the target does not have.
    c.objective.noise = "gaussian(offset=0.0, perturbation=0.0)"
    # What changes the loss besides, one after another: a term or several, such as
    # ("variational_bound(weight=1e-3)", "uncertainty()").
    # - uncertainty(): weighs each noise level by its learned uncertainty (EDM2)
    # - variational_bound(weight=1e-3): learned variances (improved DDPM); needs discrete times
    # - alignment(encoder="...", block=0, weight=0.5, stop=0, hidden=2048): aligns inner tokens with
    #   an encoder's (REPA; config/alignment.py says what the options are)
    c.objective.terms = FieldReference((), field_type=object)

    c.consistency = ConfigDict()  # objective.name="consistency"
    c.consistency.teacher = ""  # workdir of a denoiser; empty: consistency training, without one
    c.consistency.nodes = 18  # steps that the teacher takes from noise to data
    c.consistency.solver = "heun"  # of each of these steps: heun or euler
    c.consistency.target = "ema"  # the average that is learned from, or params, the student itself

    c.autoencoding = ConfigDict()  # objective.name="autoencoding"
    c.autoencoding.distance = "l1"  # or l2
    c.autoencoding.kl_weight = 1e-6
    c.autoencoding.learned_variance = False  # of the reconstruction
    c.autoencoding.perceptual = ""  # .safetensors of LPIPS (see pretrained/networks/lpips.py)
    c.autoencoding.perceptual_weight = 1.0
    c.autoencoding.adversary = ""  # hinge or vanilla; empty: none
    c.autoencoding.adversary_weight = 0.5  # times the adaptive weight
    c.autoencoding.adversary_start = 50_001  # steps before it counts
    c.autoencoding.discriminator = fields(PatchDiscriminator)

    c.optimizer = ConfigDict()
    c.optimizer.name = "adam"  # adam, adamw, lion, muon or sgd
    c.optimizer.learning_rate = 1e-3
    c.optimizer.warmup = 100  # steps
    c.optimizer.decay = "constant"  # constant, cosine, linear or rsqrt
    c.optimizer.decay_start = 0
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.999
    c.optimizer.eps = 1e-8
    c.optimizer.weight_decay = 0.0
    c.optimizer.clip_norm = 1.0  # 0: no clipping

    c.ema = "constant(decay=0.999)"  # or power_function(sigma_rel=0.1); of the parameters

    c.train = ConfigDict()
    c.train.steps = 1000
    c.train.batch_size = 128  # over all devices
    c.train.accumulate = 1  # pieces that each device cuts its share into, to save memory
    c.train.log_every = 50
    c.train.sample_every = 0  # steps between sample grids; 0: only at the end
    c.train.checkpoint_every = 1000
    c.train.keep = 2  # newest checkpoints kept
    c.train.validate_every = 0  # steps between losses on held-out data; 0: none
    c.train.validation_count = 1000  # examples of them, at most
    c.train.max_skipped = 10  # steps in a row whose loss or gradients may be not finite
    c.train.keep_best = 0  # checkpoints kept besides, those with the best
    c.train.best = "loss"  # metric of the log, best when low; "-name": best when high
    c.train.accept_changes = False  # go on although the workdir's run had another config
    c.train.snapshot_every = 0  # steps between snapshots of averages, for sampler.average="posthoc"
    c.train.snapshot_sigma_rel = (0.05, 0.10)  # of those averages
    c.train.init_from = ""  # a run's workdir, or one of its checkpoints: begin with its parameters
    c.train.init_what = ""  # regular expression: which of them, by path; empty: all
    c.train.init_average = "ema"  # or "params", those that were trained

    c.log = ConfigDict()
    c.log.wandb = ""  # project on Weights & Biases; empty: not there
    c.log.peak_tflops = 0.0  # TFLOP/s of one device at most; 0: as known of common ones

    c.profile = ConfigDict()  # --mode=profile
    c.profile.steps = 5
    c.profile.warmup = 3  # steps before them

    c.sampler = ConfigDict()
    c.sampler.checkpoint = "newest"  # or "best" (train.best), or a step
    # Which parameters: ema, params (as trained), posthoc(sigma_rel=0.15), or
    # posthoc_constant(decay=0.999), the last two from train.snapshot_every's snapshots.
    c.sampler.average = "ema"
    c.sampler.solver = "dpmpp_2m"
    c.sampler.grid = "uniform"
    c.sampler.steps = 20
    # Links of a chain, from the innermost on, as "cfg(3), interval(0.3, 2), clip()" or a tuple:
    #   cfg(scale, split=False), autoguidance("WORKDIR", scale): away from the model without its
    #     label or caption, or from a weaker model; scale 1 is the model alone
    #   rescale(phi=0.7), adaptive_projected(eta=0, norm_threshold=5, momentum=-0.5): how the two
    #     estimates are combined; perturbed_attention(scale, blocks="auto") adds to it
    #   classifier("WORKDIR", scale=1): by the gradient of a classifier of noised images
    #   interval(low, high): what stands before it, only where sigma / alpha lies between these
    #   clip(), dynamic_threshold(quantile=0.995, largest=1.5): keep x_0_hat in [-1, 1]
    c.sampler.guidance = FieldReference(("clip()",), field_type=object)
    # What makes evaluations cheaper, likewise: cache(every(3), keep=1): deep features of a U-Net,
    # or later blocks of a DiT, at every third evaluation (keep=0: all of the network);
    # guidance_cache(every(2)): what guidance steers away from; merge_tokens(0.5, at_least=1024):
    # half the tokens of a U-Net's self-attentions. Besides every(n): dense(n), at((0, 2, 5)) and,
    # for cache, adaptive(0.1).
    c.sampler.acceleration = FieldReference((), field_type=object)
    c.sampler.corrector = ""  # langevin(steps=1, snr=0.16) after each step; empty: none
    c.sampler.batch_size = 100
    c.sampler.seed = 0
    c.sampler.preview_every = 0  # evaluations between pictures of x_0_hat in --mode=sample; 0: none

    c.samples = ConfigDict()
    c.samples.count = 100  # drawn by --mode=sample
    c.samples.columns = 10  # of the grids
    c.samples.captions = ()  # of the samples; empty: held-out ones
    # Label or caption to steer away from; empty: the null class, no caption
    c.samples.negative = FieldReference("", field_type=object)
    c.samples.gif = False  # --mode=sample: an animation of the trajectories too

    c.evaluation = ConfigDict()
    c.evaluation.classifier = ""  # digits_svc, lenet5; empty: none
    c.evaluation.weights = ""  # lenet5: path of its weights
    c.evaluation.count = 1000  # samples judged
    c.evaluation.likelihood = ""  # ode or bound: bits per dimension of data; empty: none
    c.evaluation.likelihood_count = 500  # examples of the held-out and of the training data

    c.inspect = ConfigDict()  # --mode=inspect
    c.inspect.count = 60  # pictures on the contact sheet
    c.inspect.columns = 10

    c.sweep = ConfigDict()  # --mode=sweep: evaluation.count samples of each solver and budget
    c.sweep.solvers = ("ddim", "ddpm", "heun", "dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde")
    c.sweep.evaluations = (4, 6, 8, 10, 15, 20, 30, 50)  # at most, of the denoiser
    c.sweep.reference = "heun"  # the solver that the exact flow is approximated with
    c.sweep.reference_steps = 100

    c.learn = ConfigDict()  # --mode=learn: few-step solvers for this model
    c.learn.evaluations = (4, 6, 8, 10)
    c.learn.teacher = "dpmpp_2m"  # the deterministic solver that they learn from
    c.learn.teacher_steps = 60
    c.learn.count = 256  # samples to learn from
    c.learn.held_out = 64  # to choose by
    c.learn.test = 128  # to report
    c.learn.batch_size = 32
    c.learn.iterations = 80
    c.learn.learning_rate = 0.02
    # What is compared with, each on each grid; one of ddim, dpmpp_2m and dpmpp_3m is the start.
    c.learn.against = (
        "ddim",
        "dpmpp_2m",
        "dpmpp_3m",
        "heun",
        "lms",
        "deis",
        "unipc",
        "unipc(order=3)",
    )
    c.learn.grids = ("uniform", "karras", "beta")
    return c


def fields(module: type, **overrides: Any) -> ConfigDict:
    """A linen module's fields, with its defaults, as a config."""
    config = ConfigDict()
    for field in dataclasses.fields(module):
        if field.name in _DERIVED:
            continue
        value = overrides.get(field.name, field.default)
        if field.type in ("bool", "int", "float", "str"):
            config[field.name] = value
        else:  # several types (one value, or one per level): any Python literal
            config[field.name] = FieldReference(value, field_type=object)
    return config


def values(module: nn.Module) -> dict[str, Any]:
    """The fields of a preset, to ``update`` a model's config with."""
    names = {field.name for field in dataclasses.fields(module)} - _DERIVED
    return {name: getattr(module, name) for name in names}
