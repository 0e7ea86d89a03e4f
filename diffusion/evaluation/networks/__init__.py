"""Feature networks: one file each, with a function that makes a ``network.Network``.

Its name in ``CHOICES`` is what a config calls it: ``frechet(lenet5("FILE"))``.
"""

from diffusion.evaluation.networks import (
    autoencoder,
    clip,
    digits_svc,
    dinov2,
    i3d,
    inception,
    lenet5,
    lpips,
    network,
    sentences,
    taef2,
    vggish,
)

CHOICES = {
    "autoencoder": autoencoder.autoencoder,
    "clip": clip.clip,
    "digits_svc": digits_svc.digits_svc,
    "dinov2": dinov2.dinov2,
    "i3d": i3d.i3d,
    "inception": inception.inception,
    "lenet5": lenet5.lenet5,
    "lpips": lpips.lpips,
    "nsfwjs": inception.nsfwjs,
    "pixels": network.pixels,
    "sentences": sentences.sentences,
    "taef2": taef2.taef2,
    "vggish": vggish.vggish,
}
