"""Training a backend for a few steps beside the reference; used on the CPU and in the simulator."""

import numpy as np

from common import reference
from common.network import Network, initial_parameters
from common.training import Trainer


def assert_training_parity(backend, architecture, *, steps, batch_size, samples, learning_rate):
    """Train over whole epochs: the loss of every step and the parameters at the end are the reference's."""
    rng = np.random.default_rng(5)
    images = rng.integers(0, 256, (samples, *architecture.input_shape), np.uint8)
    parameters = initial_parameters(architecture, 1)
    network = Network(backend, architecture, batch_size, parameters)
    network.poison()
    trainer = Trainer(network, images, learning_rate=learning_rate, seed=2)
    losses = []
    batches = []
    for epoch in range(-(-steps // trainer.steps)):
        trainer.run_epoch()
        losses.extend(trainer.read_losses())
        order = np.arange(samples, dtype=np.int32)
        np.random.default_rng([2, epoch]).shuffle(order)
        batches += [images[order[i : i + batch_size]] / 255.0 for i in range(0, samples, batch_size)]
    assert len(losses) >= steps
    expected_losses, expected = reference.train(architecture, parameters, batches, learning_rate)
    np.testing.assert_allclose(losses, expected_losses, rtol=2e-5)
    if steps > 1:
        assert expected_losses[-1] < expected_losses[0]
    actual = network.read_parameters()
    for name, start in parameters.items():
        moved = np.linalg.norm(expected[name] - start)
        assert moved > 0, name
        # A share of the distance moved, not of the values, which training hardly changes.
        assert np.linalg.norm(actual[name] - expected[name]) <= 2e-3 * moved, name
    return network
