"""Pictures from a pretrained pipeline: Stable Diffusion 1 and 2, SDXL, and their relatives.

    python main.py --mode=generate --config=configs/stable_diffusion.py \
        --config.model=DIR_OR_HUB_ID --config.prompt="a lighthouse at dusk, oil painting"

``model`` is a folder as diffusers saves it, a single safetensors file in the original naming, or
a hub id. What is done follows from it and from the fields that are set: ``image`` alone makes
pictures from a picture, with ``mask`` it repaints the mask's white part; an upscaler, an
InstructPix2Pix or a DiT do what they were trained for; ``refiner`` takes over SDXL's last steps.
Pictures go to --workdir (by default ``generated``), with their settings as PNG text.
"""

from ml_collections import ConfigDict, FieldReference


def get_config() -> ConfigDict:
    """Every field of --mode=generate, with its default."""
    c = ConfigDict()
    c.model = ""  # a diffusers folder, a .safetensors file or a hub id
    c.revision = ""  # of the hub id
    c.variant = ""  # of the weights' files: fp16
    c.dtype = "auto"  # float32, bfloat16 or float16; auto: bfloat16 but float32 on a CPU
    c.prediction_type = ""  # of a single file: epsilon or v_prediction; empty: the published one
    c.tokenizer = ""  # for a single file: CLIP's folder or merges file; empty: from the hub
    c.refiner = ""  # an SDXL refiner, for the last steps

    c.prompt = ""
    c.prompts = ""  # a text file with a prompt per line, instead
    c.negative = ""  # what to steer away from
    c.weighted = False  # read (word:1.3), ((word)) and [word] as weights
    c.clip_skip = 0  # last layers of the text encoder to leave out
    c.labels = ()  # classes, for a DiT
    c.count = 1  # pictures of each prompt or class

    c.image = ""  # a picture to start from
    c.mask = ""  # white is painted anew
    c.strength = 0.8  # how much of the picture is made anew, 0 to 1 (inpainting: 1 starts at noise)
    c.noise_level = 20  # added to the upscaler's picture
    c.height = 0  # pixels; 0: what the network was trained on, or the picture's
    c.width = 0
    # SDXL's micro-conditioning: size of the training picture (empty: the picture's), where it was
    # cropped, and the refiner's scores, to steer to and away from
    c.original = ()  # (height, width)
    c.crop = (0, 0)  # (top, left)
    c.aesthetic = (6.0, 2.5)

    c.sampler = ConfigDict()
    # The pipeline's own scheduler (empty), another class of diffusers, with options:
    # "DPMSolverMultistepScheduler(use_karras_sigmas=True)", or a solver of this project: "dpmpp_2m"
    c.sampler.solver = ""
    c.sampler.grid = "uniform"  # for this project's solvers
    c.sampler.steps = 30
    # As in configs/base.py; "cfg(7.5), rescale(0.7)" is against overexposure. An InstructPix2Pix
    # takes instruct(7.5, 1.5): how closely to follow the text, and how closely the picture.
    c.sampler.guidance = FieldReference("cfg(7.5)", field_type=object)
    c.sampler.acceleration = FieldReference((), field_type=object)  # cheaper, as in configs/base.py
    c.sampler.hand_over = 0.8  # share of the schedule before the refiner
    c.sampler.batch_size = 1  # pictures at a time
    c.sampler.seed = 0  # picture i of a seed is the same in any batch

    c.tile = 0  # decode in tiles of so many pixels, to save memory; 0: whole pictures
    return c
