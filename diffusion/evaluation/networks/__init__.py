"""Feature networks: one file each, with a function that makes a ``network.Network``.

Its name in ``CHOICES`` is what a config calls it: ``frechet(lenet5("FILE"))``.
"""

from diffusion.evaluation.networks import digits_svc, lenet5, network

CHOICES = {
    "digits_svc": digits_svc.digits_svc,
    "lenet5": lenet5.lenet5,
    "pixels": network.pixels,
}
