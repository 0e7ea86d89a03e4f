"""The resizers against torch-fidelity's and clean-fid's, at the sizes that data sets have."""

import numpy as np
import pytest
import torch
from torch_fidelity_import import torch_fidelity

from diffusion.evaluation import resize

cleanfid = pytest.importorskip("cleanfid.resize")

SHAPES = [(n, n) for n in (1, 7, 32, 64, 256, 299, 300, 512)] + [(37, 201), (400, 90)]


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_published_evaluators(shape):
    x = np.random.default_rng(0).integers(0, 256, (1, *shape, 3), dtype=np.uint8)
    module = torch_fidelity.interpolate_compat_tensorflow
    tensor = torch.from_numpy(x).permute(0, 3, 1, 2).float()
    expected = module.interpolate_bilinear_2d_like_tensorflow1x(
        tensor, size=(299, 299), align_corners=False
    )
    given = resize.tf_bilinear(x, 299)
    np.testing.assert_allclose(given, expected.permute(0, 2, 3, 1), rtol=0, atol=1e-4)
    for mode, ours in {
        "clean": resize.pil_bicubic,
        "legacy_pytorch": resize.torch_bilinear,
    }.items():
        expected = cleanfid.build_resizer(mode)(x[0])
        np.testing.assert_allclose(ours(x, 299)[0], expected, rtol=0, atol=1e-4, err_msg=mode)
