"""What V5's kernels cost on the GPU: FLOPs and bytes; the bytes that cuBLAS requests are not known.

A stage that goes through the batch in parts launches a kernel once a part: a row stands for all these launches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from common.architecture import TAPS, Architecture, Stage
from common.operations import Operation
from common.work import KernelWork, float_bytes, halo_extent, sum_work
from versions.v5_winograd_nhwc import gpu_plan
from versions.v5_winograd_nhwc.gpu_plan import REACHING, TAP_GRADIENTS, Scratch, small_pixels
from versions.v5_winograd_nhwc.plan import method, stage_plan, tiles
from versions.v5_winograd_nhwc.winograd import A_T, B_T, OUTPUTS, PRODUCTS, G, transposed

Add = Callable[..., None]
ROUTE_BYTES = 1  # beside the four of a value


def gpu_work(architecture: Architecture, batch_size: int) -> list[KernelWork]:
    """Every kernel of the stages of a training step on the GPU, those of the parts of a batch taken together."""
    space = gpu_plan.scratch(architecture, batch_size)
    work: dict[tuple, list[KernelWork]] = {}
    for i, stage in enumerate(architecture.stages):
        for operation in (Operation.STAGE_FORWARD, Operation.STAGE_BACKWARD):
            # No operation needs the gradient of the pictures.
            for row in _stage_work(stage, batch_size, operation, space, data=i > 0):
                work.setdefault((row.stage, row.operation, row.kernel), []).append(row)
    return [_together(rows) for rows in work.values()]


def _together(rows: list[KernelWork]) -> KernelWork:
    """Several launches of a kernel for one operation; a thread's loads are those of a launch on average."""
    asked = None if rows[0].asked_bytes is None else sum(row.asked_bytes for row in rows)
    return replace(
        rows[0],
        flops=sum(row.flops for row in rows),
        least_bytes=sum(row.least_bytes for row in rows),
        asked_bytes=asked,
        loads=sum(row.loads for row in rows) / len(rows),
    )


def _stage_work(stage: Stage, n: int, operation: Operation, space: Scratch, *, data: bool) -> list[KernelWork]:
    rows: list[KernelWork] = []

    def add(kernel: str, flops: int, least: int, asked: int | None = -1, **turns: float) -> None:
        """``asked`` is the same as ``least`` where it is not given."""
        rows.append(KernelWork(stage.name, operation, kernel, flops, least, least if asked == -1 else asked, **turns))

    forward, plan = operation is Operation.STAGE_FORWARD, stage_plan(stage, n)
    products = plan.forward_flops if forward else plan.filter_flops + data * plan.data_flops
    if method(stage) == "unfold":
        (_direct_forward if forward else _direct_gradients)(add, rows, stage, n, operation)
        if data and not forward:
            _winograd_data(add, stage, n, space)
            add("cuBLAS", plan.data_flops, _winograd_product_bytes(stage, n, 1), None)
    elif method(stage) == "winograd":
        if forward:
            _winograd_forward(add, stage, n, space)
        else:
            _winograd_gradients(add, rows, stage, n, operation, space)
            if data:
                _winograd_data(add, stage, n, space)
        shares = (
            0 if forward else sum(gpu_plan.filter_shares(stage, m, space) for _, m in gpu_plan.parts(stage, n, space))
        )
        least = _winograd_product_bytes(stage, n, forward + (data and not forward), shares)
        add("cuBLAS", products, least, None)
    elif forward:
        _taps_forward(add, stage, n, space)
        add("cuBLAS", products, _taps_product_bytes(stage, n), None)
    else:
        shares = _taps_gradients(add, rows, stage, n, operation, space, data)
        least = _taps_product_bytes(stage, n, shares) + data * _taps_product_bytes(stage, n)
        add("cuBLAS", products, least, None)
    return rows


# Winograd's algorithm -------------------------------------------------------------------------------------------------


def _winograd_forward(add: Add, stage: Stage, n: int, space: Scratch) -> None:
    _filter_transform(add, stage, "")
    _tile_transform(add, stage, n, "input", stage.in_channels, None)
    _output_transform(add, stage, n, stage.out_channels, stage.resample, bias=True)


def _winograd_data(add: Add, stage: Stage, n: int, space: Scratch) -> None:
    _filter_transform(add, stage, "[flipped]")
    _tile_transform(add, stage, n, "input", stage.out_channels, stage.resample)
    _output_transform(add, stage, n, stage.in_channels, None, bias=False)


def _winograd_gradients(
    add: Add, rows: list[KernelWork], stage: Stage, n: int, operation: Operation, space: Scratch
) -> None:
    _tile_transform(add, stage, n, "input", stage.in_channels, None)
    _tile_transform(add, stage, n, "gradient", stage.out_channels, stage.resample)
    for first, count in gpu_plan.parts(stage, n, space):
        _bias(add, rows, stage, count, count * tiles(stage), operation, space, first > 0)
        shares = gpu_plan.filter_shares(stage, count, space)
        weights = stage.in_channels * stage.out_channels
        moved = float_bytes((shares, PRODUCTS, weights), (1 + (first > 0), TAPS, weights))
        flops = weights * (shares * PRODUCTS + _transform_flops(transposed(G)))
        add("filter_gradient_kernel", flops, moved, loads=PRODUCTS * shares)


def _winograd_product_bytes(stage: Stage, n: int, convolutions: int, shares: int = 0) -> int:
    """Convolutions, and a filter gradient if it has shares."""
    c, k, rows = stage.in_channels, stage.out_channels, n * tiles(stage)
    both = float_bytes((PRODUCTS, rows, c + k))
    filters = float_bytes((PRODUCTS, c, k))
    return convolutions * (both + filters) + (both + shares * filters if shares else 0)


def _filter_transform(add: Add, stage: Stage, variant: str) -> None:
    weights = stage.in_channels * stage.out_channels
    add(
        f"filter_transform_kernel{variant}",
        weights * _transform_flops(G),
        float_bytes((TAPS + PRODUCTS, weights)),
    )


def _tile_transform(add: Add, stage: Stage, n: int, kind: str, channels: int, resample: str | None) -> None:
    """``resample`` is that of the stage where the tiles are of a gradient."""
    side, border = {"input": (OUTPUTS, True), "gradient": (OUTPUTS, False), "taps": (2, True)}[kind]
    matrix = {"input": B_T, "gradient": transposed(A_T), "taps": TAP_GRADIENTS}[kind]
    height, width = stage.height, stage.width
    if resample == "maxpool":  # it is the windows that are loaded
        height, width, side = height // 2, width // 2, side // 2
    extents = [halo_extent(length, side) if border else length for length in (height, width)]
    value = 4 + (ROUTE_BYTES if resample else 0)
    rows = n * (small_pixels(stage) if kind == "taps" else tiles(stage))
    stored = float_bytes((rows, len(matrix) ** 2, channels))
    variant = ", ".join(filter(None, (kind, resample)))
    add(
        f"tile_transform_kernel[{variant}]",
        rows * channels * _transform_flops(matrix),
        n * height * width * channels * value + stored,
        n * extents[0] * extents[1] * channels * value + stored,
    )


def _output_transform(add: Add, stage: Stage, n: int, channels: int, resample: str | None, *, bias: bool) -> None:
    rows = n * tiles(stage)
    read, stored = float_bytes((PRODUCTS, rows, channels)), _stored_bytes(stage, n, channels, resample)
    variant = ", ".join(filter(None, (bias and "bias", resample)))
    flops = rows * channels * (_transform_flops(A_T) + OUTPUTS * OUTPUTS * (bias + (resample is not None)))
    add(
        f"output_transform_kernel{f'[{variant}]' if variant else ''}",
        flops,
        read + stored + bias * float_bytes((channels,)),
        read + stored + bias * float_bytes((rows, channels)),
    )


def _stored_bytes(stage: Stage, n: int, channels: int, resample: str | None) -> int:
    """Bytes of an output and its route."""
    positions = stage.height * stage.width
    if resample == "maxpool":
        positions = (stage.height // 2) * (stage.width // 2)
    return n * positions * channels * (4 + (ROUTE_BYTES if resample else 0))


def _transform_flops(matrix: tuple) -> int:
    """FLOPs of ``matrix`` . X . ``matrix``^T; a coefficient of one costs as much as any other."""
    line = sum(2 * sum(value != 0 for value in row) - 1 for row in matrix)
    return line * (len(matrix) + len(matrix[0]))


def _bias(
    add: Add,
    rows: list[KernelWork],
    stage: Stage,
    count: int,
    length: int,
    operation: Operation,
    space: Scratch,
    accumulate: bool,
) -> None:
    """Two passes of a sum over ``length`` rows."""
    k, shares = stage.out_channels, gpu_plan.bias_shares(stage, count, space)
    moved = float_bytes((length, k), (shares, k))
    add("column_sums_kernel", length * k, moved, loads=length / shares)
    _sum(rows, stage, operation, shares, k, accumulate)


def _sum(
    rows: list[KernelWork], stage: Stage, operation: Operation, shares: int, values: int, accumulate: bool = False
) -> None:
    row = sum_work(stage, operation, shares, values)
    again = float_bytes((values,)) if accumulate else 0
    rows.append(replace(row, least_bytes=row.least_bytes + again, asked_bytes=row.asked_bytes + again))


# Upsampled maps -------------------------------------------------------------------------------------------------------


def _taps_forward(add: Add, stage: Stage, n: int, space: Scratch) -> None:
    _order_taps(add, stage)
    k, rows = stage.out_channels, n * small_pixels(stage)
    # Along an axis five products reach a small pixel, but two of them from neighbours.
    read = n * (5 * (stage.height // 2) - 2) * (5 * (stage.width // 2) - 2)
    stored = _stored_bytes(stage, n, k, stage.resample)
    add(
        f"tap_sums_kernel{f'[{stage.resample}]' if stage.resample else ''}",
        rows * k * (_transform_flops(REACHING) + 4 * (1 + stage.relu)),
        float_bytes((rows, TAPS, k), (k,)) + stored,
        float_bytes((read, k), (rows, k)) + stored,
    )


def _taps_gradients(
    add: Add, rows: list[KernelWork], stage: Stage, n: int, operation: Operation, space: Scratch, data: bool
) -> int:
    """Everything around the products of the backward pass; returns how many shares the filter gradient has."""
    c, k, weights = stage.in_channels, stage.out_channels, stage.weight_count
    _tile_transform(add, stage, n, "taps", k, stage.resample)
    total = 0
    for first, count in gpu_plan.parts(stage, n, space):
        _bias(add, rows, stage, count, count * small_pixels(stage), operation, space, first > 0)
        shares = gpu_plan.filter_shares(stage, count, space)
        total += shares
        if gpu_plan.ordered(stage):
            moved = float_bytes((shares + 1 + (first > 0), weights))
            add("sum_taps_kernel", shares * weights, moved, loads=shares)
        else:
            _sum(rows, stage, operation, shares, weights, first > 0)
    if data:
        _order_taps(add, stage)
        shares = gpu_plan.data_shares(stage, n, space)
        if shares > 1:
            _sum(rows, stage, operation, shares, n * small_pixels(stage) * c)
    return total


def _order_taps(add: Add, stage: Stage) -> None:
    if gpu_plan.ordered(stage):
        add("order_taps_kernel", 0, float_bytes((2, stage.weight_count)))


def _taps_product_bytes(stage: Stage, n: int, shares: int = 1) -> int:
    pixels = n * small_pixels(stage)
    return float_bytes((pixels, stage.in_channels), (pixels, TAPS, stage.out_channels), (shares, stage.weight_count))


# Few channels ---------------------------------------------------------------------------------------------------------


def _direct_forward(add: Add, rows: list[KernelWork], stage: Stage, n: int, operation: Operation) -> None:
    grid, k = gpu_plan.direct_grid(stage), stage.out_channels
    blocks, weights = grid.blocks(n), TAPS * stage.in_channels
    groups = -(-k // (gpu_plan.DIRECT_THREADS * gpu_plan.DIRECT_FILTERS))
    pieces, stored = grid.number(n) / blocks, _stored_bytes(stage, n, k, stage.resample)
    pictures = float_bytes((n, stage.height, stage.width, stage.in_channels))
    add(
        f"direct_forward_kernel{f'[{stage.resample}]' if stage.resample else ''}",
        n * stage.flops,
        pictures + float_bytes((stage.parameter_count,)) + stored,
        groups * _patch_bytes(stage, n) + float_bytes((blocks, weights + 1, k)) + stored,
        # A value of the patch serves every place of the window that it reaches, and all filters of a thread.
        shared_loads_per_fma=16 * stage.in_channels / (4 * weights * gpu_plan.DIRECT_FILTERS),
        fmas=4 * weights * grid.windows * gpu_plan.DIRECT_FILTERS * pieces,
        rounds=(pieces,),
    )


def _direct_gradients(add: Add, rows: list[KernelWork], stage: Stage, n: int, operation: Operation) -> None:
    grid, k = gpu_plan.direct_grid(stage), stage.out_channels
    shares, weights = grid.shares(n), TAPS * stage.in_channels
    groups = -(-k // gpu_plan.DIRECT_THREADS)
    read = _stored_bytes(stage, n, k, stage.resample) + float_bytes((shares, weights + 1, k))
    pictures = float_bytes((n, stage.height, stage.width, stage.in_channels))
    places = 1 if stage.resample == "maxpool" else 4
    pieces = grid.number(n) / shares
    add(
        f"direct_filter_kernel{f'[{stage.resample}]' if stage.resample else ''}",
        stage_plan(stage, n).filter_flops,
        pictures + read,
        groups * _patch_bytes(stage, n) + read,
        shared_loads_per_fma=1.0,
        fmas=places * weights * grid.windows * pieces,
        rounds=(pieces,),
    )
    _sum(rows, stage, operation, shares, stage.weight_count)
    _sum(rows, stage, operation, shares, k)


def _patch_bytes(stage: Stage, n: int) -> int:
    """Bytes of the patches of all pieces: rows and columns inside the picture."""
    grid = gpu_plan.direct_grid(stage)

    def inside(length: int, step: int, pieces: int) -> int:
        spans = [min(length, (i + 1) * step + 1) - max(0, i * step - 1) for i in range(pieces)]
        return sum(max(0, span) for span in spans)

    rows, columns = inside(stage.height, 2, grid.rows), inside(stage.width, 2 * grid.windows, grid.pieces)
    return float_bytes((n, rows, columns, stage.in_channels))
