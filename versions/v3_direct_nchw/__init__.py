"""V3, direct, NCHW: the convolution straight from the planes, with the reuse in registers.

The idea: in NCHW a row of a plane is contiguous, so threads on neighbouring pixels read neighbouring addresses,
whatever the channel, and no tile has to be staged for that. What a thread reads it uses for several rows and several
filters at once, out of registers; what its neighbours read as well, the cache serves.

What changed from V2: the layout, and no input in shared memory. A thread's outputs are a strip, a few rows of one
column, instead of a run along the row. Only the weights are staged, since all threads of a block read the same ones at
the same time; the 3x3 window is unrolled around them.

Layout: pictures (N, C, H, W), filters (K, C, R, S).

Who owns what on the GPU (sizes in ``plan.py``):

- Forward, and backward data over filters turned by 180 degrees: a thread owns a strip of 4 rows x 1 column for 16
  filters (8 on 8x8 planes; 2 rows x 3 filters where there are three). Threads take strips in the order column, group of
  rows, picture: a warp covers four rows of a 32x32 plane and two pictures of 8x8 planes, and none of it idles.
- Backward filter: a thread owns 8 filters x 1 channel x 9 taps (3 x 2 x 9 where there are three filters), and every
  32nd column of a share of the pictures, down which it walks. Lanes lie on columns, so a warp's 32 sums are added at
  the end, in shared memory; a block's warps take neighbouring channels, so that they read the same dy. The shares are
  added by a second kernel, always in the same order.
- Backward bias: a block owns one filter and a share of the pictures, and folds its threads' sums in half again and
  again; the shares as above.

Bytes moved: forward, a thread reads 18 inputs a channel for its 64 outputs, 14 of which its neighbours own: 1,152 FLOPs
for 72 bytes asked of the cache, 16 a byte, where V1 has 0.25. A weight is read from shared memory once for four rows,
0.25 floats a multiply-add. ``convbench describe --backend v3 --device gpu`` prints this for every kernel.

On the CPU: a picture is copied once, plane by plane, with zeros between its rows, so that each tap is a shift of one
long line and vectors are full however short a row is. The nine taps of three filters are unrolled around each line.

Run it: ``convbench run --backend v3``
"""

from common.architecture import Architecture
from common.backend import Device
from common.device import VECTOR
from versions.v3_direct_nchw.plan import gpu_work, gpu_workspace

__all__ = ["gpu_work", "workspace"]


def workspace(architecture: Architecture, batch_size: int, device: Device, threads: int) -> dict[str, tuple[int, ...]]:
    """Workspace buffers in floats."""
    if device == "cpu":
        stages = architecture.stages
        # Backward data runs the forward kernel from the filters' side, so either side's picture must fit.
        # A line of outputs is whole vectors. One longer than its plane reads on behind it, behind the last one too.
        padded_picture = VECTOR + max(
            max(stage.in_channels, stage.out_channels) * ((stage.height + 2) * (stage.width + 1) + 2)
            for stage in stages
        )
        longest = max(stage.height * (stage.width + 1) for stage in stages)
        most_weights = max(stage.weight_count for stage in stages)
        return {
            "turned filters": (most_weights,),
            "padded pictures": (threads, padded_picture),
            "output planes": (threads, 3 * -(-longest // VECTOR) * VECTOR),
            "filter gradient parts": (threads, most_weights),
        }
    return gpu_workspace(architecture, batch_size)
