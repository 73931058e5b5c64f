"""V4, im2col + GEMM, NCHW: the convolution as a matrix product, computed by a tuned library.

Idea (Chellapilla, Puri and Simard, 2006): stack nine shifted copies of each channel of a picture. The result, the
column matrix, has a row for every (channel, tap) and a column for every position. Filters times columns is the
convolution, and cuBLAS (BLAS on the CPU) computes it.

What changed from the direct versions: the inner loops are gone, at the cost of memory. A column matrix is nine times as
large as its picture, so it is built for a part of the batch at a time, in a workspace that stays under 75 MB.

The narrow side: a convolution from C to K channels equals the transposed convolution from K to C channels with flipped
filters w' (each window rotated by 180 degrees, K and C exchanged). So either side can be unfolded. V4 always unfolds
the side with fewer channels. For conv5 (256 -> 3) the column matrix then has 27 rows instead of 2,304, at equal FLOPs:

    ============ ======================== ===========================
    operation    C <= K                   C > K (filters flipped)
    ============ ======================== ===========================
    forward      y = w . im2col(x)        y = col2im(w'^T . x)
    data         dx = col2im(w^T . dy)    dx = w' . im2col(dy)
    filter       dw = dy . im2col(x)^T    dw' = x . im2col(dy)^T
    ============ ======================== ===========================

Layout: pictures (N, C, H, W), filters (K, C, R, S). A picture is already a (C, H*W) matrix and a filter bank a
(K, C*R*S) matrix. Only the flipped filters w' (C, K*R*S) need a copy, in each operation that uses them.

Who owns what on the GPU: in im2col, one thread per position of a plane, which writes its nine values; in the kernel
after a product, one thread per value of the picture or per window of the pooling, which adds its nine values of the
columns in a fixed order, without atomics, then the bias, applies ReLU, and pools or upsamples (pooling after a fold has
a kernel of its own: together they are slower); cuBLAS does the rest.
In the filter gradient the products of the pictures are separate, so that they fill a large card, and a kernel adds
them. On the CPU each thread processes one picture at a time with its own column matrix, small enough for the cache,
and single-threaded BLAS.

Bytes moved: a column matrix of min(C, K) channels is written once and read once, 72 bytes per position and channel.
The product reads its operands from global memory and works on tiles on the chip.

Run it: ``convbench run --backend v4``
"""

from versions.v4_im2col_gemm_nchw.plan import workspace
from versions.v4_im2col_gemm_nchw.work import gpu_work

__all__ = ["gpu_work", "workspace"]
