"""The reference against PyTorch, an independent implementation of the same network."""

import numpy as np
import pytest

from common import reference
from common.architecture import autoencoder
from common.network import initial_parameters

torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra: peers)")


def test_loss_and_gradients_are_pytorchs():
    from bench.measure.peers import torch_autoencoder

    architecture = autoencoder((16, 12), (7, 5))
    parameters = initial_parameters(architecture, 0)
    pictures = np.random.default_rng(0).random((3, *architecture.input_shape))
    model = torch_autoencoder(architecture, parameters).double()
    x = torch.from_numpy(pictures)
    loss = torch.nn.functional.mse_loss(model(x), x)
    loss.backward()
    step = reference.forward_backward(architecture, parameters, pictures)
    assert loss.item() == pytest.approx(step.loss, rel=1e-12)
    ours = [step.gradients[name] for name in parameters]
    for gradient, expected, name in zip((p.grad.numpy() for p in model.parameters()), ours, parameters, strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-14, err_msg=name)
