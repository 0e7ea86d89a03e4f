"""Against torch-fidelity's Inception: random parameters, pictures of every size."""

from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from torch_fidelity_import import torch_fidelity

from diffusion.evaluation.networks.inception import inception

SIZES = {32: 2, 64: 2, 256: 1, 299: 1, 512: 1}  # side of the pictures -> how many


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """Their network, and the file of its weights."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    module = torch_fidelity.feature_extractor_inceptionv3
    kind = module.FeatureExtractorInceptionV3
    load, module.torch.load = module.torch.load, lambda *_, **__: None
    check, kind.load_state_dict = kind.load_state_dict, lambda *_, **__: None
    try:
        net = kind("inception", ["2048", "logits_unbiased"], "random")
    finally:
        module.torch.load, kind.load_state_dict = load, check
    for part in net.modules():
        if isinstance(part, torch.nn.Conv2d):
            fan = part.weight[0].numel()
            torch.nn.init.normal_(part.weight, std=(2 / fan) ** 0.5)
        if isinstance(part, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(part.weight, 0.7, 1.3)
            torch.nn.init.normal_(part.bias, std=0.1)
            torch.nn.init.normal_(part.running_mean, std=0.1)
            torch.nn.init.uniform_(part.running_var, 0.5, 1.5)
    path = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    safetensors.torch.save_file(net.state_dict(), path)
    spatial = []
    net.Mixed_6d.branch1x1.register_forward_hook(lambda *args: spatial.append(args[-1]))

    def run(x):
        spatial.clear()
        with torch.inference_mode():
            features, logits = net(torch.from_numpy(x).permute(0, 3, 1, 2))
        nhwc = spatial[0][:, :7].permute(0, 2, 3, 1).reshape(len(x), -1)
        return {"features": features, "spatial": nhwc, "logits": logits}

    return run, path


def test_is_that_of_torch_fidelity(theirs):
    run, path = theirs
    net = replace(inception(str(path)), batch=1)  # one compilation for all
    for side, count in SIZES.items():
        rng = np.random.default_rng(side)
        x = rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
        given = net(x, [None] * count, net.outputs)
        for name, expected in run(x).items():
            expected = expected.numpy()
            assert given[name].shape == expected.shape
            np.testing.assert_allclose(
                given[name], expected, rtol=0, atol=1e-4, err_msg=f"{name} at {side}"
            )
