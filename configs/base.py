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
_DERIVED |= {"learned_variance", "out_features", "two_times"}
_DERIVED |= {"in_channels", "context_width", "added_width", "image_size", "sample_size"}
_DERIVED |= {"scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast"}


def get_config() -> ConfigDict:
    """The base configuration, which trains nothing in particular."""
    c = ConfigDict()
    c.seed = 0
    # Layout over the devices: pmap (each has the whole state) or fsdp (each has a part of it)
    c.parallel = "pmap"

    c.data = ConfigDict()
    # digits, mnist, cifar10, latents, points; folder (images in class subfolders, or with captions
    # in metadata.jsonl), arrays (.npz, .npy); any TFDS name; with captions in .npz: captioned,
    # emoji, tiles, emoji_and_tiles; subject (DreamBooth's, below); edits (InstructPix2Pix's: .npz
    # with images, edited and caption, or a folder whose metadata.jsonl names edited files)
    c.data.name = "digits"
    c.data.dir = ""  # the folder of the files or TFDS sets; mnist and cifar10 are downloaded to it
    c.data.padding = 0  # pixels of zeros around each image (mnist)
    c.data.density = "two_moons"  # density that points are drawn from
    c.data.scale = 1.0  # factor of latents
    c.data.num_classes = 0  # classes of latents; 0 counts the labels
    # For folders, arrays, TFDS sets and captioned images:
    c.data.size = 0  # pixels of the short side after resizing; 0 keeps images that have one size
    c.data.background = (255, 255, 255)  # colour behind transparent parts
    c.data.held_out = 0.05  # share of images (or captions) held out, if there is no split
    c.data.channels = 0  # 1 (grey) or 3; 0 means 3 for files, and those of arrays and TFDS sets
    c.data.crop = "center"  # crop of the longer side: center, or random in every epoch
    c.data.buckets = ""  # aspect(step=64, max_aspect=2.0): shapes of the area size^2, not squares
    c.data.on_error = "raise"  # damaged images of a folder: raise, or skip after one check of all
    c.data.flip = False  # mirror images at random
    c.data.dtype = "float32"  # dtype of batches; bfloat16 halves the transfer to the device
    c.data.threads = 2  # reader threads; 0 means one per core
    c.data.workers = 0  # reader processes, each with that many threads; 0 means this process
    c.data.prefetch = 8  # batches kept ready
    c.data.tokenizer = ""  # CLIP's bpe_simple_vocab_16e6.txt.gz, or a tokenizer's folder
    c.data.tokens = 20  # longest caption, with start and end
    c.data.shuffle_tags = False  # shuffle captions' tags, parted by commas, in every epoch
    c.data.keep_tags = 0  # the first tags, which are neither shuffled nor dropped
    c.data.tag_dropout = 0.0  # share of the other tags that is left out
    # Sentences around captions, which are then a word to learn: object or style; empty: none
    c.data.template = ""
    c.data.autoencoder = ""  # folder of an autoencoder; training is then on latents of the images
    c.data.text_encoder = ""  # folder of a frozen text encoder; training is on its embeddings
    c.data.cache = ""  # folder for latents and embeddings, computed once
    # What a ControlNet learns to follow: canny(low=100, high=200), soft_edges(), scribble(),
    # lineart(), segments(), blur(), shuffle(); or given, the pictures to edit of data.name="edits"
    c.data.hint = ""
    c.data.std = 0.5  # sigma_data of EDM's preconditioning and weighting

    c.data.subject = ConfigDict()  # data.name="subject", whose pictures are in data.dir
    c.data.subject.prompt = ""  # what it is called, with a rare word: "a photo of sks dog"
    # Pictures of its class, which half of each batch is of, with objective.terms=
    # "prior_preservation()"; the model draws what is missing of them. Empty: the subject alone
    c.data.subject.class_dir = ""
    c.data.subject.class_prompt = ""  # "a photo of a dog"
    c.data.subject.class_count = 200  # pictures of the class, at least

    c.model = ConfigDict()
    c.model.name = "unet"  # which of those below: unet, dit, mlp, autoencoder; or pretrained
    c.model.dtype = "auto"  # float32, bfloat16 (or float16, to draw); auto: bfloat16 for a
    # pretrained model on an accelerator, else float32
    c.model.unet = fields(UNet)
    c.model.dit = fields(DiT, width=384, depth=12, heads=6, patch=2)
    c.model.mlp = fields(MLP)
    c.model.autoencoder = fields(AutoencoderKL)
    c.model.remat = False  # pretrained: recompute blocks in the backward pass, to save memory
    c.model.text = ConfigDict()  # text encoder that is trained with the unet or dit
    c.model.text.width = 192
    c.model.text.depth = 3
    c.model.text.heads = 3
    # A model to draw from or to fine-tune (name="pretrained"): a run's workdir, a folder as
    # diffusers saves it, a .safetensors file or a hub id. Empty: the run in --workdir.
    c.model.path = ""
    c.model.revision = ""  # branch, tag or commit of a hub id
    c.model.variant = ""  # variant of the weights' files: fp16
    c.model.prediction_type = ""  # of a single file: epsilon or v_prediction; empty: as published
    c.model.tokenizer = ""  # for a single file: CLIP's folder or merges file; empty: from the hub
    c.model.vae = ""  # an autoencoder's folder or hub id, instead of a pretrained model's own
    # Another network's folder, hub id or file of weights, instead of a pretrained model's own
    c.model.network = ""
    # Of a few-step checkpoint, which has its own solver, steps and guidance: "lightning(steps=4)"
    # (pipelines/few_step_families.py); auto: what the files and their names say; empty: none
    c.model.family = "auto"
    c.model.refiner = ""  # an SDXL refiner, which takes the last steps
    c.model.tile = 0  # pixels of the tiles in which pictures are decoded; 0: whole pictures

    # Adapters that are merged into the model that is drawn from, by file or folder: LoRA and its
    # relatives and embeddings, such as ("style.safetensors(0.8)", "runs/lora", "token.safetensors")
    c.adapters = FieldReference((), field_type=object)
    # What ControlNets and T2I-Adapters follow, in --mode=generate:
    # canny(net="FOLDER", image="x.png", scale=0.8) and more (pipelines/condition_maps.py)
    c.control = FieldReference((), field_type=object)
    # Pictures whose content or style is taken over: ip_adapter("FILE", image="x.png", scale=0.6)
    c.image_prompts = FieldReference((), field_type=object)

    c.objective = ConfigDict()
    c.objective.name = "denoising"  # few_steps, autoencoding or classification (of noised ones)
    # What is trained beside the model in model.path (model.name="pretrained"), which stays as it
    # is, such as "lora(rank=16)" (adapters/choices.py); empty: the network itself is trained
    c.objective.adapter = ""
    c.objective.schedule = "cosine"
    c.objective.prediction = "v"  # eps, x0, v, flow or edm
    c.objective.c_noise = "auto"  # ddpm_index, thousand_t, log_sigma; auto depends on the schedule
    c.objective.times = "auto"  # log_normal on the schedule edm, else uniform
    c.objective.stratified = True  # spread a batch's times evenly
    c.objective.weighting = "simple"
    c.objective.distance = "l2"
    # Which noise an image is mixed with in training: independent; optimal_transport(group=64,
    # same_label=False) within groups, by default a device's share of the batch; nearest(k=4), the
    # nearest of k. The last two suit deterministic samplers alone (objectives/couplings.py).
    c.objective.coupling = "independent"
    c.objective.t_min = 1e-5  # smallest time trained on
    c.objective.conditional = True  # use labels or captions, if the data have them
    # Share trained without label or caption, for classifier-free guidance
    c.objective.label_dropout = 0.1
    # Which signals are dropped at that rate: together; instruct (InstructPix2Pix: text, both,
    # picture) or image_prompt (IP-Adapter: picture, text, both), each of three at that rate, which
    # takes another as image_prompt(rate=0.05). auto depends on what pictures the data have
    c.objective.dropout = "auto"
    # How noise is drawn. offset: strength of noise that all pixels of a channel share;
    # perturbation: strength of noise in the input that the target does not have
    c.objective.noise = "gaussian(offset=0.0, perturbation=0.0)"
    # Terms that change the loss, in this order, such as
    # ("variational_bound(weight=1e-3)", "uncertainty()"):
    # - uncertainty(): weighs each noise level by its learned uncertainty (EDM2)
    # - variational_bound(weight=1e-3): learned variances (improved DDPM); needs discrete times
    # - prior_preservation(weight=1.0): the share of a class's pictures (data.name="subject")
    # - alignment(encoder="...", block=0, weight=0.5, stop=0, hidden=2048): aligns inner tokens with
    #   an encoder's (REPA; config/alignment.py explains the options)
    c.objective.terms = FieldReference((), field_type=object)

    c.few_steps = ConfigDict()  # objective.name="few_steps": networks that sample in few steps
    # How it learns (config/few_steps.py has all methods, objectives/few_steps/ their options):
    # consistency(nodes(18), solver="heun", target="ema"), with pairs nodes, karras, ect, segments
    # or trajectories; continuous(); mean_flow(); shortcut(); progressive(steps=8);
    # guidance_distillation(); reflow(count=50_000, one_step=False); distribution_matching(steps=4,
    # every=5, adversary=0.0); score_identity(); adversarial(features=teacher), latent_adversarial()
    # and flash(), whose critics see features of teacher, classifier("RUN") or dinov2("FOLDER");
    # drifting(tau=0.05), of points
    c.few_steps.method = "consistency()"
    c.few_steps.teacher = ""  # workdir of a denoiser; base: the model beside an adapter; "": none
    # Scale of the teacher's guidance, or (lowest, highest), between which it is drawn
    c.few_steps.guidance = FieldReference((), field_type=object)

    c.autoencoding = ConfigDict()  # objective.name="autoencoding"
    c.autoencoding.distance = "l1"  # or l2
    c.autoencoding.kl_weight = 1e-6
    c.autoencoding.learned_variance = False  # learn the reconstruction's variance
    c.autoencoding.perceptual = ""  # .safetensors of LPIPS (see pretrained/networks/lpips.py)
    c.autoencoding.perceptual_weight = 1.0
    c.autoencoding.adversary = ""  # hinge or vanilla; empty: no discriminator
    c.autoencoding.adversary_weight = 0.5  # factor of the adaptive weight
    c.autoencoding.adversary_start = 50_001  # steps before the discriminator counts
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
    # Factors of the learning rate of some parameters, by a regular expression over their paths:
    # (("text/", 0.1), ("/up$", 16.0)); the first that fits counts
    c.optimizer.rates = FieldReference((), field_type=object)

    c.ema = "constant(decay=0.999)"  # average of the parameters; or power_function(sigma_rel=0.1)

    c.train = ConfigDict()
    c.train.steps = 1000
    c.train.batch_size = 128  # examples per step, over all devices
    c.train.accumulate = 1  # pieces that each device cuts its share into, to save memory
    c.train.log_every = 50
    c.train.sample_every = 0  # steps between sample grids; 0: only at the end
    c.train.checkpoint_every = 1000
    c.train.keep = 2  # newest checkpoints kept
    c.train.validate_every = 0  # steps between losses on held-out data; 0: never
    c.train.validation_count = 1000  # held-out examples that are used, at most
    # Metrics by which training may choose (train.best), taken of so many samples beside every
    # second held-out example; the others are left for evaluation
    c.train.validation_metrics = FieldReference((), field_type=object)
    c.train.validation_samples = 500
    c.train.max_skipped = 10  # steps in a row whose loss or gradients may be not finite
    c.train.keep_best = 0  # further checkpoints kept, those with the best metric
    c.train.best = "loss"  # a metric of the log that is best when low; "-name": best when high
    c.train.accept_changes = False  # go on although the workdir's run had another config
    c.train.snapshot_every = 0  # steps between snapshots of averages, for sampler.average="posthoc"
    c.train.snapshot_sigma_rel = (0.05, 0.10)  # widths of those averages
    c.train.init_from = ""  # a run's workdir or checkpoint, whose parameters training begins with
    c.train.init_what = ""  # regular expression of their paths; empty: all
    c.train.init_average = "ema"  # or "params", as trained

    c.log = ConfigDict()
    c.log.wandb = ""  # project on Weights & Biases; empty: none
    c.log.peak_tflops = 0.0  # TFLOP/s of one device at most; 0: known for common devices

    c.profile = ConfigDict()  # --mode=profile
    c.profile.steps = 5
    c.profile.warmup = 3  # steps before them

    c.sampler = ConfigDict()
    c.sampler.checkpoint = "newest"  # or "best" (train.best), or a step
    # Which parameters: ema, params (as trained), posthoc(sigma_rel=0.15) or
    # posthoc_constant(decay=0.999); the last two come from train.snapshot_every's snapshots
    c.sampler.average = "ema"
    # auto is the model's own: a pretrained model's scheduler, else dpmpp_2m in 20 steps with clip()
    # on a grid that suits the schedule (grids.usual). Pretrained models also take diffusers'
    # classes, with options: "EulerDiscreteScheduler(use_karras_sigmas=True)"
    c.sampler.solver = "auto"
    c.sampler.grid = "auto"
    c.sampler.steps = 0  # 0 is auto
    # Links of a chain, from the innermost on, as "cfg(3), interval(0.3, 2), clip()" or a tuple:
    #   cfg(scale, split=False), autoguidance("WORKDIR", scale): away from the model without its
    #     label or caption, or from a weaker model; scale 1 is the model alone
    #   rescale(phi=0.7), adaptive_projected(eta=0, norm_threshold=5, momentum=-0.5): how the two
    #     estimates are combined; perturbed_attention(scale, blocks="auto") adds to it
    #   instruct(scale, image_scale): InstructPix2Pix's guidance by text and picture
    #   classifier("WORKDIR", scale=1): by the gradient of a classifier of noised images
    #   interval(low, high): limits what stands before it to low <= sigma / alpha <= high
    #   clip(), dynamic_threshold(quantile=0.995, largest=1.5): keep x_0_hat in [-1, 1]
    c.sampler.guidance = FieldReference("auto", field_type=object)
    # What makes evaluations cheaper, likewise: cache(every(3), keep=1) evaluates deep features of a
    # U-Net, or later blocks of a DiT, at every third evaluation (keep=0: the whole network);
    # guidance_cache(every(2)) what guidance steers away from; merge_tokens(0.5, at_least=1024)
    # merges half the tokens of a U-Net's self-attentions. Besides every(n) there are dense(n),
    # at((0, 2, 5)) and, for cache, adaptive(0.1)
    c.sampler.acceleration = FieldReference((), field_type=object)
    c.sampler.corrector = ""  # langevin(steps=1, snr=0.16) after each step; empty: none
    c.sampler.hand_over = 0.8  # share of the schedule before the refiner
    c.sampler.batch_size = 0  # samples at a time; 0 means 100 for a run, 1 for a pretrained model
    c.sampler.seed = 0  # sample i of a seed is the same in any batch
    c.sampler.preview_every = 0  # evaluations between pictures of x_0_hat in --mode=sample; 0: none

    c.samples = ConfigDict()  # what is drawn
    # Samples of --mode=sample, or pictures of each prompt or class in --mode=generate; 0 means 100
    # and 1
    c.samples.count = 0
    c.samples.columns = 10  # columns of grids
    # A prompt or caption, several, or "@FILE" with one per line. None: a run's held-out captions
    c.samples.prompt = FieldReference(None, field_type=object)
    c.samples.labels = FieldReference((), field_type=object)  # classes; empty: all in turn
    # Label, caption or prompt to steer away from; empty: the null class, no caption
    c.samples.negative = FieldReference("", field_type=object)
    c.samples.gif = False  # --mode=sample: also an animation of the trajectories
    # --mode=generate:
    c.samples.image = ""  # a picture to start from, to repaint, to enlarge or to edit
    c.samples.mask = ""  # its white part is painted anew
    c.samples.fit = "crop"  # of a picture of other proportions: crop, or pad with white
    c.samples.paste = True  # what the mask leaves black is taken from the picture, to the pixel
    c.samples.strength = 0.8  # how much of the picture is made anew, 0 to 1 (mask: 1 is from noise)
    c.samples.noise_level = 20  # noise that is added to an upscaler's picture
    c.samples.height = 0  # pixels; 0 means the trained size, or a pretrained model's picture's
    c.samples.width = 0
    c.samples.weighted = False  # read (word:1.3), ((word)) and [word] in prompts as weights
    # What such weights leave as it was: none, mean (Stable Diffusion 1), norm; auto: norm for SDXL
    c.samples.emphasis = "auto"
    c.samples.clip_skip = 0  # last layers of the text encoder to leave out
    # SDXL's micro-conditioning: (height, width) of the training picture (empty: the picture's),
    # (top, left) of where it was cropped, and the refiner's scores, to steer to and away from
    c.samples.original = FieldReference((), field_type=object)
    c.samples.crop = (0, 0)
    c.samples.aesthetic = (6.0, 2.5)

    c.evaluation = ConfigDict()
    c.evaluation.count = 1000  # samples judged
    # Metrics (evaluation/metrics/): fid(), kid(), precision_recall(), frechet(pixels),
    # recognition(digits_svc), memorisation(), wasserstein(), caption_gap(), bits(ode()), ...; auto
    # chooses those that need nothing but the data
    c.evaluation.metrics = FieldReference("auto", field_type=object)
    # Feature network of the metrics that name none (evaluation/networks/), with the file or folder
    # of its weights: 'inception("FILE.safetensors")', 'dinov2("FOLDER")', 'clip("FOLDER")', ...
    c.evaluation.features = ""
    # Real examples of the metrics that name none: test (held out), train, validation, or an .npz
    # of --mode=reference, ADM, EDM or clean-fid
    c.evaluation.reference = "test"
    c.evaluation.samples = (
        ""  # .npz or folder of samples to judge, instead of drawing; count=0: all
    )
    c.evaluation.keep = ""  # what stays in workdir/shards: features, or samples as well
    c.evaluation.shard = 1000  # samples between two savings of their features
    c.evaluation.part = (0, 1)  # (i, n): make only shards i, i + n, ..., others are made elsewhere

    c.reference = ConfigDict()  # --mode=reference, with evaluation.features
    c.reference.split = "train"  # or test
    c.reference.examples = 10_000  # whose features and pictures are kept, besides all statistics
    c.reference.pictures = True  # keep pictures too

    c.inspect = ConfigDict()  # --mode=inspect
    c.inspect.count = 60  # pictures on the contact sheet
    c.inspect.columns = 10

    c.sweep = ConfigDict()  # --mode=sweep: evaluation.count samples of each solver and budget
    c.sweep.solvers = ("ddim", "ddpm", "heun", "dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde")
    c.sweep.evaluations = (4, 6, 8, 10, 15, 20, 30, 50)  # evaluations of the denoiser, at most
    c.sweep.reference = "heun"  # solver that approximates the exact flow
    c.sweep.reference_steps = 100
    # Workdirs of students of few steps, which are drawn beside, with their own solvers
    c.sweep.students = FieldReference((), field_type=object)
    c.sweep.seeds = 1  # seeds from sampler.seed on, by each of which every point is measured

    c.compare = ConfigDict()  # --mode=compare: evaluations of several runs in one table
    # Folders of runs or of single evaluations, or patterns: "runs/ablation/*"; several as a tuple
    c.compare.runs = FieldReference("", field_type=object)
    # Figures of evaluation.json; empty: the first six that all results share
    c.compare.figures = FieldReference((), field_type=object)

    c.learn = ConfigDict()  # --mode=learn: few-step solvers for this model
    c.learn.evaluations = (4, 6, 8, 10)
    c.learn.teacher = "dpmpp_2m"  # deterministic solver that they learn from
    c.learn.teacher_steps = 60
    c.learn.count = 256  # samples to learn from
    c.learn.held_out = 64  # to choose by
    c.learn.test = 128  # to report
    c.learn.batch_size = 32
    c.learn.iterations = 80
    c.learn.learning_rate = 0.02
    # Fixed solvers to compare with, each on each grid; learning starts from ddim, dpmpp_2m or
    # dpmpp_3m.
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
