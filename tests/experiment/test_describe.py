from configs import digits
from diffusion.experiment import describe
from diffusion.experiment.build import build


def described(tmp_path, shardings=None, **fields):
    config = digits.get_config()
    config.update_from_flattened_dict(fields)
    experiment = build(config)
    found = describe.describe(experiment)
    return found, describe.tell(experiment, found, tmp_path, shardings)
