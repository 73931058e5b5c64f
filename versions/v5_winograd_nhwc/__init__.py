"""V5, Winograd and products before upsampling, NHWC: the same function with a quarter of the multiplications.

V1 to V4 multiply and add 1.033 GFLOP a picture, each in its own order. V5 changes what is computed:

    ============= ==================================== ============================= ===========================
    stage         method                               products, forward             instead of
    ============= ==================================== ============================= ===========================
    conv1         ``unfold``: im2col, a few rows       27 a pixel                    27 a pixel
    conv2, conv3  ``winograd``: F(4x4, 3x3)            36 a tile of 4x4 pixels       144 a tile
    conv4, conv5  ``taps``: on the map not upsampled   9 a small pixel               36 a small pixel
    ============= ==================================== ============================= ===========================

each for every pair of a channel and a filter.

Winograd's algorithm (Lavin and Gray, 2016; ``winograd.py`` has it): Y = A^T [ (G g G^T) * (B^T d B) ] A for a 6x6 tile
d of the input and 4x4 outputs. Tiles and filters are transformed, for each of the 36 places all tiles are multiplied
with all filters, (tiles, C) . (C, K), and the results are transformed back. Backward data is the same with flipped
filters, backward filter its transpose. The transforms add and subtract numbers far larger than their result, so the
rounding error is larger: its bound is 31 times that of a direct sum. ``winograd.error_factor`` derives this.

Taps: after a nearest-neighbour upsampling, four pixels have the same value, and a tap multiplies all four by the same
weight. One product on the small map, P = x . W, has each of these once, and every output adds the nine of them that
reach it. That is exact but for rounding. The gradient arrives on the small map, so upsampling needs no backward pass.

What changed in the contract's terms: V5 has whole stages only. Bias, ReLU and pooling end the forward pass of a stage,
and their backward begins its backward pass. Kept between the two is a byte for each value of the output, its route:
where in the pooling window the gradient goes, or that the ReLU stops it. Full-size outputs of conv1 and conv2 and
upsampled maps are never in memory.

Layout: pictures (N, H, W, C), filters (K, R, S, C), so that transforms are vectors over channels. Transformed tiles are
(36, tiles, C), transformed filters (36, K, C).

Who owns what on the CPU: threads take small pieces of work as they become free (a row of tiles, one of the 36 products,
some pictures and filters), so that a slow core does not make the others wait. Each value is computed within one piece,
and sums over pieces are added in a fixed order: results do not depend on the number of threads. On the GPU a thread of
a transform kernel owns a tile and a channel; cuBLAS multiplies, in strided batches.

Bytes moved: in the Winograd stages each input value is read 2.25 times (tiles overlap), written once for each of the
2.25 places it is transformed to, and as often read by the product.

Run it: ``convbench run --backend v5``
"""

from versions.v5_winograd_nhwc.plan import stage_plan, workspace
from versions.v5_winograd_nhwc.work import gpu_work

__all__ = ["gpu_work", "stage_plan", "workspace"]
