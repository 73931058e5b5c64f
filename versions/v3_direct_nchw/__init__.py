"""V3, direct, NCHW: the convolution reads the planes directly and reuses values in registers.

Idea: in NCHW a row of a plane is contiguous, so threads on neighbouring pixels read neighbouring addresses for every
channel. No input tile has to be staged. A thread uses each value that it reads for several rows and several filters,
from registers. Values that its neighbours read too come from the cache.

What changed from V2: the layout, and no input in shared memory. A thread's outputs are a strip, a few rows of one
column, instead of a run along a row. Only the weights are staged, because all threads of a block read the same ones at
the same time. The 3x3 window is unrolled.

Layout: pictures (N, C, H, W), filters (K, C, R, S).

Who owns what on the GPU (sizes in ``plan.py``):

- Forward, and backward data with flipped filters (each window rotated by 180 degrees, K and C exchanged): a thread
  owns a strip of 4 rows x 1 column for 16 filters (8 filters on 8x8 planes; 2 rows x 3 filters if there are three).
  Consecutive threads take strips in the order column, group of rows, picture. So a warp covers four rows of a 32x32
  plane, or two whole 8x8 planes of neighbouring pictures, and no lane is idle.
- Backward filter: a thread owns 8 filters x 2 channels x 9 taps (fewer in conv1 and conv5) and every 32nd column of a
  share of the pictures; it walks down each column. Of the window of x two rows stay in registers from step to step, so
  that each row is read once. Neighbouring lanes take neighbouring columns, so a warp's 32 sums are added at the end in
  shared memory. The warps of a block take neighbouring channels, so that they read the same dy. A second kernel adds
  the shares in a fixed order.
- Backward bias: a block owns one filter and a share of the pictures, and adds its threads' sums by repeated halving. A
  second kernel adds the shares.

Bytes moved: in forward a thread reads 18 inputs per channel for its 64 outputs; 14 of them belong to its neighbours.
That is 1,152 FLOPs for 72 bytes requested from the cache, 16 FLOP per byte; V1 has 0.25. A weight is read from shared
memory once for four rows, 0.25 floats per multiply-add. The filter gradient reads 12 inputs and 16 gradients for 288
multiply-adds. ``convbench describe --backend v3 --device gpu`` prints this for every kernel.

A kernel is built for each shape of the network: sizes that the compiler knows turn divisions into shifts and make most
guards disappear.

On the CPU: a picture is copied once, plane by plane, with zeros between its rows. Each tap is then a shift of one long
line, and vectors are full even if rows are short. The nine taps of three filters are unrolled.

Run it: ``convbench run --backend v3``
"""

from common.architecture import Architecture
from common.backend import Device
from common.device import VECTOR
from versions.v3_direct_nchw.plan import gpu_workspace
from versions.v3_direct_nchw.work import gpu_work

__all__ = ["gpu_work", "workspace"]


def workspace(architecture: Architecture, batch_size: int, device: Device, threads: int) -> dict[str, tuple[int, ...]]:
    """Workspace buffers in floats."""
    if device == "cpu":
        stages = architecture.stages
        # Backward data runs the forward kernel with C and K exchanged, so the picture of either side must fit.
        # A line of outputs is rounded up to whole vectors, so the loop reads up to VECTOR floats past the last plane.
        padded_picture = VECTOR + max(
            max(stage.in_channels, stage.out_channels) * ((stage.height + 2) * (stage.width + 1) + 2)
            for stage in stages
        )
        longest = max(stage.height * (stage.width + 1) for stage in stages)
        most_weights = max(stage.weight_count for stage in stages)
        return {
            "flipped filters": (most_weights,),
            "padded pictures": (threads, padded_picture),
            "output planes": (threads, 3 * -(-longest // VECTOR) * VECTOR),
            "filter gradient parts": (threads, most_weights),
        }
    return gpu_workspace(architecture, batch_size)
