"""The names of the kernels that a version launches in a training step of the real network."""

from bench.kernels.launches import recorded_launches
from common.gpu_jit import kernel_label
from versions.registry import BackendInfo


def kernel_labels(info: BackendInfo) -> set[str]:
    """Each kernel's name and variant."""
    return {kernel_label(launch.kernel) for launch in recorded_launches(info)}
