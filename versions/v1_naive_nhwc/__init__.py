"""V1, naive, NHWC: the convolution as its definition reads, one output value at a time.

The idea: nothing is staged, shared or reused on purpose. Whatever speed there is comes from the hardware's caches and
from the compiler; every later version is measured against this one.

Layout: pictures (N, H, W, C), filters (K, R, S, C), so that the innermost loop over input channels reads both
operands contiguously.

Who owns what on the GPU: one thread per value of the output, whichever output that is. Forward: y[n,h,w,k], with
neighbouring threads on neighbouring filters. Backward data: dx[n,h,w,c]. Backward filter: dw[k,r,s,c], a thread
summing over all pictures and positions on its own, which needs no second pass and is deterministic. Backward bias:
db[k].

Bytes moved: each forward output reads 9*C values of x and 9*C of w from global memory, 72*C bytes for 18*C FLOPs:
0.25 FLOP a byte before the caches help.

On the CPU: the same loops, in parallel over N and H (the gradient to the filters over K and R, whose sums are then
each thread's own).

Run it: ``convbench run --backend v1``
"""

from common.architecture import Architecture
from common.backend import Device
from common.work import KernelWork, float_bytes, taps_inside


def workspace(architecture: Architecture, batch_size: int, device: Device, threads: int) -> dict[str, tuple[int, ...]]:
    """V1 needs none: every sum stays in the register of the thread that owns the output."""
    return {}


def gpu_work(architecture: Architecture, batch_size: int) -> list[KernelWork]:
    """Every convolution kernel of a training step on the GPU: each multiply-add loads both of its operands."""
    work = []
    for i, stage in enumerate(architecture.stages):
        n, c, k, h, w = batch_size, stage.in_channels, stage.out_channels, stage.height, stage.width
        x, weights, y = n * h * w * c, stage.weight_count, n * h * w * k
        loads = 2 * n * taps_inside(h, w) * c * k
        least, flops = float_bytes((x,), (weights,), (y,)), n * stage.flops
        stores = {"forward": y, "backward data": x, "backward filter": weights}
        if i == 0:  # nothing needs the gradient to the pictures themselves
            del stores["backward data"]
        for operation, outputs in stores.items():
            kernel = f"conv2d_{operation.replace(' ', '_')}_kernel"
            biases = outputs if operation == "forward" else 0
            asked = float_bytes((loads,), (biases,), (outputs,))
            work.append(KernelWork(stage.name, operation, kernel, flops, least, asked))
        moved = float_bytes((y,), (k,))
        work.append(KernelWork(stage.name, "backward bias", "conv2d_backward_bias_kernel", y, moved, moved))
    return work
