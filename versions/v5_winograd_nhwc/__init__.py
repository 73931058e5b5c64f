"""V5, Winograd and products before upsampling, NHWC."""

from versions.v5_winograd_nhwc.gpu_plan import gpu_workspace
from versions.v5_winograd_nhwc.plan import stage_plan
from versions.v5_winograd_nhwc.work import gpu_work


def workspace(architecture, batch_size, device, threads):
    """Workspace buffers in floats."""
    return gpu_workspace(architecture, batch_size)


__all__ = ["gpu_work", "stage_plan", "workspace"]
