"""The same network in PyTorch, to measure against. Needs the extra ``peers``."""

from __future__ import annotations

import numpy as np

from common.architecture import Architecture


def torch_autoencoder(architecture: Architecture, parameters: dict[str, np.ndarray]):
    """Build the network as a ``torch.nn.Sequential`` with these parameters (canonical order)."""
    import torch
    from torch import nn

    layers: list[nn.Module] = []
    for stage in architecture.stages:
        convolution = nn.Conv2d(stage.in_channels, stage.out_channels, 3, padding=1)
        with torch.no_grad():
            convolution.weight.copy_(torch.from_numpy(parameters[f"{stage.name}.weight"]))
            convolution.bias.copy_(torch.from_numpy(parameters[f"{stage.name}.bias"]))
        layers.append(convolution)
        if stage.resample is not None:
            layers.append(nn.ReLU())
            layers.append(nn.MaxPool2d(2) if stage.resample == "maxpool" else nn.Upsample(scale_factor=2))
    return nn.Sequential(*layers)
