"""How V4 divides the work: which side is unfolded, the workspace and its bound, parts of a batch. No device code."""

from itertools import pairwise

from common.architecture import TAPS, Architecture, Stage
from common.backend import Device

WORKSPACE_LIMIT_BYTES = 75_000_000


def narrow_channels(stage: Stage) -> int:
    """Channels of the side that is unfolded: the smaller number."""
    return min(stage.in_channels, stage.out_channels)


def flipped(stage: Stage) -> bool:
    """Whether the output is the narrow side: then filters are flipped, and im2col and col2im exchanged."""
    return stage.in_channels > stage.out_channels


def fuses_resampling(stage: Stage) -> bool:
    """Whether what follows a product on the GPU also pools or upsamples.

    Not where it folds and pools: lanes would read every second column, which costs more than a second kernel.
    """
    return not (flipped(stage) and stage.resample == "maxpool")


def workspace(architecture: Architecture, batch_size: int, device: Device, threads: int) -> dict[str, tuple[int, ...]]:
    """Workspace buffers in floats. On the GPU they stay under 75 MB together, unless one picture alone needs more."""
    stages = architecture.stages
    most_weights = max(stage.weight_count for stage in stages)
    if device == "cpu":
        columns = max(TAPS * narrow_channels(stage) * stage.height * stage.width for stage in stages)
        return {
            "columns": (threads, columns),
            "flipped filters": (most_weights,),
            "filter gradient parts": (threads, most_weights),
        }
    positions = max(stage.height * stage.width for stage in stages)
    largest = max(floats_per_picture(stage) for stage in stages)
    fixed = 2 * most_weights + batch_size * max(stage.out_channels for stage in stages) + max(positions, batch_size)
    pictures = max(1, min(batch_size, (WORKSPACE_LIMIT_BYTES // 4 - fixed) // largest))
    # Each stage's batch is split into even parts of as many pictures as fit; a small stage needs fewer parts.
    scratch = max(
        floats_per_picture(stage) * min(batch_size, max(1, pictures * largest // floats_per_picture(stage)))
        for stage in stages
    )
    return {
        "columns": (scratch,),
        "flipped filters": (most_weights,),
        "flipped filter gradient": (most_weights,),
        "bias partial sums": (batch_size * max(stage.out_channels for stage in stages),),
        "ones": (max(positions, batch_size),),
    }


def floats_per_picture(stage: Stage) -> int:
    """Scratch for one picture on the GPU: its column matrix and, for the filter gradient, a gradient of its own."""
    return TAPS * narrow_channels(stage) * stage.height * stage.width + stage.weight_count


def parts(batch_size: int, pictures_at_once: int) -> list[tuple[int, int]]:
    """Split a batch evenly into as few parts as possible: pairs of first picture and count."""
    count = -(-batch_size // pictures_at_once)
    bounds = [batch_size * i // count for i in range(count + 1)]
    return [(first, last - first) for first, last in pairwise(bounds)]


def filter_parts(stage: Stage, architecture: Architecture, batch_size: int) -> list[tuple[int, int]]:
    """The parts of a batch in the filter gradient on the GPU; see ``parts``."""
    (floats,) = workspace(architecture, batch_size, "gpu", 1)["columns"]
    return parts(batch_size, max(1, floats // floats_per_picture(stage)))
