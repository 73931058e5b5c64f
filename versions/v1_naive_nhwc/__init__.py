"""V1, naive, NHWC: the convolution as in its definition, one output value at a time.

Idea: no staging, no sharing, no reuse. All speed comes from the caches and the compiler. Every later version is
compared with this one.

Layout: pictures (N, H, W, C), filters (K, R, S, C). The innermost loop over input channels reads both operands
contiguously.

Who owns what on the GPU: one thread computes one output value. Forward: y[n,h,w,k], neighbouring threads have
neighbouring filters. Backward data: dx[n,h,w,c]. Backward filter: dw[k,r,s,c]; the thread sums over all pictures and
positions alone, so there is no second pass and the result is deterministic. Backward bias: db[k].

Bytes moved: each forward output reads 9*C values of x and 9*C of w from global memory, 72*C bytes for 18*C FLOPs. That
is 0.25 FLOP per byte, not counting the caches.

On the CPU: the same loops, parallel over N and H. The filter gradient is parallel over K and R, so that each sum
belongs to one thread.

Run it: ``convbench run --backend v1``
"""

from common.architecture import Architecture
from common.backend import Device
from common.operations import Operation
from common.work import KernelWork, float_bytes, taps_inside

LANES = 32  # threads of a warp


def workspace(architecture: Architecture, batch_size: int, device: Device, threads: int) -> dict[str, tuple[int, ...]]:
    """V1 needs no workspace: every sum stays in a register of the thread that owns the output."""
    return {}


def gpu_work(architecture: Architecture, batch_size: int) -> list[KernelWork]:
    """Every convolution kernel of a training step on the GPU: each multiply-add loads both operands."""
    work = []
    for i, stage in enumerate(architecture.stages):
        n, c, k, h, w = batch_size, stage.in_channels, stage.out_channels, stage.height, stage.width
        x, weights, y = n * h * w * c, stage.weight_count, n * h * w * k
        loads = 2 * n * taps_inside(h, w) * c * k
        least, flops = float_bytes((x,), (weights,), (y,)), n * stage.flops
        stores = {Operation.FORWARD: y, Operation.BACKWARD_DATA: x, Operation.BACKWARD_FILTER: weights}
        if i == 0:  # no operation needs the gradient of the pictures
            del stores[Operation.BACKWARD_DATA]
        # Loops around the innermost: the window's rows and columns, or pictures and rows of a picture.
        rounds = {Operation.BACKWARD_FILTER: (n, n * h)}
        for operation, outputs in stores.items():
            kernel = f"conv2d_{operation}_kernel"
            biases = outputs if operation is Operation.FORWARD else 0
            asked = float_bytes((loads,), (biases,), (outputs,))
            fmas = loads / 2 / outputs
            # The lanes of a warp share one operand. The other is a line for each lane in forward, where each has its
            # own filter, and one line for all of them in the gradients, where they have neighbouring channels.
            lines = fmas * (1 + (min(LANES, k) if operation is Operation.FORWARD else 1))
            turns = {"fmas": fmas, "rounds": rounds.get(operation, (3, 9)), "lines": lines}
            work.append(KernelWork(stage.name, operation, kernel, flops, least, asked, **turns))
        moved, turns = float_bytes((y,), (k,)), {"loads": n * h * w, "rounds": (n, n * h)}
        bias_kernel = "conv2d_backward_bias_kernel"
        work.append(KernelWork(stage.name, Operation.BACKWARD_BIAS, bias_kernel, y, moved, moved, **turns))
    return work
