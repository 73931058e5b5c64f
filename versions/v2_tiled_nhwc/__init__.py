"""V2, shared-memory tiled, NHWC: a block loads each value once and uses it many times.

Idea: neighbouring outputs need the same inputs, and outputs of the same filter need the same weights. A block of
threads therefore computes a tile of pixels x filters together. It steps over the input channels. At each step it loads
the tile's input with its halo and the tile's weights into shared memory, waits at a barrier, and multiplies. Each
thread keeps a small tile of outputs in registers: a value read from shared memory is used for several of them.

What changed from V1: where operands are read from. Layout and multiplications are those of V1, but the operands come
from shared memory and registers instead of global memory. The gradients are tiled too. Backward data is the same kernel
over the flipped filters, that is, with each 3x3 window rotated by 180 degrees and K and C exchanged. Backward filter
has tiles of filters x channels x nine taps.

Layout: pictures (N, H, W, C), filters (K, R, S, C), as in V1. Channels are contiguous, so threads that load a tile read
neighbouring channels.

Who owns what on the GPU (sizes in ``plan.py``):

- Forward and backward data: a block owns 8x16 pixels x 64 filters, a thread 8 neighbouring pixels x 8 filters. On 8x8
  pictures there would be too few blocks; there a block owns 8x8 pixels x 32 filters and a thread 4 pixels x 4 filters.
  With three input channels (conv1) there is a single step. With three outputs (conv5) most of a tile of filters would
  be idle: there a thread owns 8 pixels x three outputs for every eighth input channel, and the eight partial sums are
  added in shared memory, in a fixed order.
- Backward filter: a block owns 64 filters x 16 channels and a share of the pixels, a thread 8 filters x 1 channel x 9
  taps. If one side has three channels (conv1, conv5), a thread owns two channels of the other side x these three x 9
  taps. A second kernel adds the shares in a fixed order.
- Backward bias: a block owns a share of the pixels, a thread one filter in it. A second kernel adds the shares.

Bytes moved: for every input channel, a block of the wide tile reads 180 pixels and 576 weights, 3,024 bytes, and
computes 147,456 FLOPs. That is 49 FLOP per byte requested from global memory; V1 has 0.25. From shared memory it reads
34 floats for 192 multiply-adds, 0.18 each. ``convbench describe --backend v2 --device gpu`` prints this for every
kernel.

How a tile gets into shared memory (``gpu_staging.py``): each thread loads its values into registers, waits until the
tile before is no longer needed, and stores them. So the 48 loads of a thread in the convolution are in flight together,
while other warps still multiply; the filter gradient has too few registers for that and loads dy before the barrier, x
after it. Shared memory is padded so that the lanes of a warp store to different banks in the wide
stages. Tiles are not double-buffered: two buffers of eight channels would exceed the 48 KB that a block may declare,
and with two of four channels each load would use half of every 32-byte sector, with twice as many barriers.

A kernel is built for each shape of the network: sizes that the compiler knows turn divisions into shifts and make most
guards disappear.

On the CPU the caches replace shared memory, and vector registers replace the thread's tile. A few rows of a picture and
128 channels are copied with their border, in the order of the sums, and filters are packed in the same order. Register
tiles of 4 pixels x 4 filters pass over them, or of 3 x 8 in the filter gradient and where there are few channels.

Run it: ``convbench run --backend v2``
"""

from common.architecture import TAPS, Architecture
from common.backend import Device
from versions.v2_tiled_nhwc.plan import gpu_workspace
from versions.v2_tiled_nhwc.work import gpu_work

__all__ = ["gpu_work", "workspace"]

# A block on the CPU: picture rows and input channels. One filter of 9 * 128 floats is 4.5 KB; the L1 cache holds four
# of them and the windows of four pixels.
CPU_ROWS = 4
CPU_CHANNELS = 128


def workspace(architecture: Architecture, batch_size: int, device: Device, threads: int) -> dict[str, tuple[int, ...]]:
    """Workspace buffers in floats."""
    if device == "cpu":
        stages = architecture.stages
        widest = max(max(stage.in_channels, stage.out_channels) for stage in stages)
        # Backward data runs the same kernels with C and K exchanged, so the channels of either side must fit.
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
