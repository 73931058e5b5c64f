"""V2, shared-memory tiled, NHWC: each value is fetched once a block and then used many times.

The idea: neighbouring outputs need the same inputs, and outputs of the same filter the same weights. So a block of
threads computes a tile of pixels x filters together. It steps over the input channels; at each step it loads the tile's
input with its halo and the tile's weights into shared memory, waits, and multiplies. Each thread keeps a small tile of
outputs in registers, for the same reason once more: a value read from shared memory meets all of them.

What changed from V1: who reads from where. The layout and the multiplications are V1's; the operands come from shared
memory and registers instead of global memory. Every gradient is tiled as well: backward data is the same kernel over
filters turned by 180 degrees, backward filter has tiles of filters x channels x nine taps.

Layout: pictures (N, H, W, C), filters (K, R, S, C), as in V1: channels are contiguous, so threads that load a tile lie
on neighbouring channels.

Who owns what on the GPU (sizes in ``plan.py``):

- Forward and backward data: a block owns 8x16 pixels x 64 filters, a thread 8 neighbouring pixels x 8 filters. On 8x8
  pictures, where there would be too few blocks, 8x8 pixels x 32 filters and 4x4. With three input channels (conv1)
  all of them are one step. With three outputs (conv5) a tile of filters would stand idle: a thread owns 8 pixels x all
  three outputs x every eighth input channel, and the eight sums are added in shared memory, in order.
- Backward filter: a block owns 64 filters x 16 channels and a share of the pixels, a thread 8 filters x 1 channel x 9
  taps. With three channels on one side (conv1, conv5) a thread owns two channels of the other side, the three of this
  one and 9 taps. The shares are added by a second kernel, always in the same order.
- Backward bias: a block owns a share of the pixels, a thread one filter in it; added like the rest.

Bytes moved: a block of the wide tile reads 180 pixels and 576 weights for every input channel, 3,024 bytes, and makes
147,456 FLOPs of them: 49 FLOP a byte asked of global memory, where V1 has 0.25. Then 34 floats from shared memory feed
192 multiply-adds, 0.18 each. ``convbench describe --backend v2 --device gpu`` prints this for every kernel.

Shared memory is padded so that the lanes of a warp reach different banks while they load the tiles of the wide stages.
Tiles are not double-buffered: with two buffers of eight channels a block would need more than the 48 KB it may declare,
and with two of four channels each would be loaded in half the sectors and twice the barriers; the other blocks of a
multiprocessor multiply while one loads.

On the CPU the caches take shared memory's place and vector registers the threads' tile: a few rows of a picture and 128
channels are copied, border and all, in the order in which the sums run, and filters are packed the same way. Register
tiles pass over them: 4 pixels x 4 filters, or 3 x 8 in the filter gradient and where channels are few.

Run it: ``convbench run --backend v2``
"""

from common.architecture import TAPS, Architecture
from common.backend import Device
from versions.v2_tiled_nhwc.plan import gpu_work, gpu_workspace

__all__ = ["gpu_work", "workspace"]

# A block on the CPU: picture rows and input channels. A filter's run of 9 * 128 floats is 4.5 KB, and four of them and
# the windows of four pixels share the L1 cache.
CPU_ROWS = 4
CPU_CHANNELS = 128


def workspace(architecture: Architecture, batch_size: int, device: Device, threads: int) -> dict[str, tuple[int, ...]]:
    """Workspace buffers in floats."""
    if device == "cpu":
        stages = architecture.stages
        widest = max(max(stage.in_channels, stage.out_channels) for stage in stages)
        # Backward data runs the same kernels from the filters' side, so either side's channels must fit.
        block = max(
            min(CPU_ROWS, stage.height) * (stage.width + 2) * 3 * min(CPU_CHANNELS, channels)
            for stage in stages
            for channels in (stage.in_channels, stage.out_channels)
        )
        most_weights = max(stage.weight_count for stage in stages)
        return {
            "packed filters": (most_weights + 7 * widest,),
            "blocks": (threads, block),
            "tiles": (threads, 24 + 3 * widest),
            "filter gradient parts": (threads, most_weights + 2 * TAPS * widest),
        }
    return gpu_workspace(architecture, batch_size)
