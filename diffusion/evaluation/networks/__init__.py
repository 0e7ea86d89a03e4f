"""Feature networks: one file each, with a function that makes a ``network.Network``.

Its name in ``CHOICES`` is what a config calls it: ``frechet(lenet5("FILE"))``.
"""

from diffusion.evaluation.networks import digits_svc, inception, lenet5, network

CHOICES = {
    "digits_svc": digits_svc.digits_svc,
    "inception": inception.inception,
    "lenet5": lenet5.lenet5,
    "nsfwjs": inception.nsfwjs,
    "pixels": network.pixels,
}
