"""Which kernels a version launches: every operation is recorded, and every kernel is found wherever it is kept."""

import importlib.util
from dataclasses import dataclass, replace
from types import ModuleType

import numpy as np
import pytest

from bench.kernels import launches
from common.architecture import autoencoder, scaled_autoencoder
from common.errors import UsageError
from common.operations import WHOLE_STEP, Operation
from versions.registry import REGISTRY, find, names

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("numba_cuda") is None, reason="numba-cuda has no wheel for this platform"
)


@pytest.mark.parametrize("name", names())
def test_every_kernel_of_a_version_is_launched(name):
    assert launches.uncovered_kernels([find(name)]) == []


def test_every_shared_kernel_is_launched():
    assert launches.uncovered_kernels(REGISTRY) == []


@pytest.mark.parametrize("name", names())
def test_every_operation_of_every_stage_is_recorded(name):
    recorded = {(launch.stage, launch.operation) for launch in launches.recorded_launches(find(name))}
    stages = [f"conv{i}" for i in range(1, 6)]
    whole = find(name).whole_stages
    gradients = (Operation.STAGE_BACKWARD,) if whole else (Operation.BACKWARD_DATA, Operation.BACKWARD_FILTER)
    wanted = {(stage, operation) for stage in stages for operation in gradients}
    wanted |= {(WHOLE_STEP, operation) for operation in (Operation.GATHER, Operation.LOSS, Operation.SGD)}
    if not whole:
        wanted |= {("conv1", Operation.MAXPOOL_BACKWARD), ("conv4", Operation.UPSAMPLE_BACKWARD)}
    assert wanted <= recorded
    assert {stage for stage, operation in recorded if "forward" in operation} == set(stages)


def test_a_launch_outside_every_operation_is_a_defect():
    launcher = launches.RecordingRuntime("v1").bind("idle_kernel", (1,), (32,))
    with pytest.raises(RuntimeError, match="idle_kernel is launched outside gather_batch, conv2d_forward"):
        launcher(1)


@pytest.mark.parametrize("info", REGISTRY, ids=names())
def test_the_stated_work_names_the_launched_kernels(info):
    """``convbench describe`` and ``convbench kernels`` name the same kernels."""
    architecture = autoencoder()
    work = info.gpu_work(architecture, 64) + info.shared_gpu_work(architecture, 64)
    stated = {(row.stage, row.operation, row.kernel) for row in work if not row.kernel.startswith("cuBLAS")}
    launched = {(*operation, use.name) for use in launches.kernel_uses([info]) for operation in use.operations}
    # The gradient to the pictures is compiled like the others, but is not part of a step.
    assert stated == {launch for launch in launched if launch[:2] != ("conv1", Operation.BACKWARD_DATA)}


def test_a_use_has_the_shapes_of_its_launches_and_what_its_kernel_states():
    uses = {use.name: use for use in launches.kernel_uses([find("v1")])}
    use = uses["conv2d_forward_kernel"]
    assert [shape.stage for shape in use.shapes] == [stage for stage, _ in use.operations]
    assert {operation for _, operation in use.operations} <= {Operation.FORWARD, Operation.STAGE_FORWARD}
    assert use.blocks == sorted({shape.blocks for shape in use.shapes})
    assert use.threads == sorted({shape.threads for shape in use.shapes})
    assert use.stated_ffma is None
    small = {use.name: use for use in launches.kernel_uses([find("v1")], 8)}["conv2d_forward_kernel"]
    assert max(small.blocks) == max(use.blocks) // 8
    half = {use.name: use for use in launches.kernel_uses([find("v1")], 64, scaled_autoencoder(0.5))}
    assert max(half["conv2d_forward_kernel"].blocks) == max(use.blocks) // 2


def test_a_kernel_built_for_several_shapes_has_a_use_for_each(monkeypatch):
    """They have one name; their stages and operations tell them apart."""
    from common.gpu_jit import gpu_kernel

    def build(stage, ffma):
        @gpu_kernel(registers=32, ffma=ffma)
        def built_kernel(x):
            x[0] = np.float32(1)

        types, shape = ("float32[::1]",), ((4, 2), (32,))
        return launches.Launch("v1", built_kernel, types, *shape, stage, Operation.FORWARD)

    runtime = launches.RecordingRuntime("v1")
    runtime.launches = [build("conv2", 0.7), build("conv4", None)]
    monkeypatch.setattr(launches, "recorded_step", lambda info, batch_size, architecture: runtime)
    first, second = launches.kernel_uses([find("v1")])
    assert first.name == second.name == "built_kernel"
    assert first.shapes == [launches.Shape("conv2", Operation.FORWARD, 8, 32)]
    assert second.operations == [("conv4", Operation.FORWARD)]
    assert (first.stated_ffma, second.stated_ffma) == (0.7, None)


def test_kernels_are_found_wherever_a_module_keeps_them():
    from numba import cuda

    def make(name):
        def body(x):
            x[0] = np.float32(1)

        body.__name__ = name
        return cuda.jit(body)

    @dataclass(frozen=True)
    class Plan:
        kernel: object
        size: int = 4

    module = ModuleType("versions.example.gpu")
    module.plain_kernel = make("plain_kernel")
    module.KERNELS = {"wide": make("body"), "small": [make("body")]}
    module.PLAN = Plan(make("body"))
    module.Holder = type("Holder", (), {"kept": make("body"), "__module__": module.__name__})
    module.again = module.plain_kernel
    module.helper = cuda.jit(device=True)(lambda x: x)
    module.numpy = np
    found = launches.kernels_of(module)
    assert list(found.values()) == ["plain_kernel", "KERNELS[wide]", "KERNELS[small][0]", "PLAN.kernel", "Holder.kept"]
    launched = [module.plain_kernel, module.PLAN.kernel, module.KERNELS["small"][0], module.Holder.kept]
    assert launches.missing_kernels(module, launched) == ["KERNELS[wide]"]


def test_a_kernel_that_nothing_launches_is_a_fault(monkeypatch):
    from numba import cuda

    from common import gpu_kernels
    from versions.v1_naive_nhwc import gpu

    monkeypatch.setattr(gpu, "EXTRA", {"idle": cuda.jit(lambda x: None)}, raising=False)
    assert launches.uncovered_kernels([find("v1")]) == ["v1: EXTRA[idle] is launched by no operation of the network"]
    monkeypatch.setattr(gpu_kernels, "idle_kernel", cuda.jit(lambda x: None), raising=False)
    assert launches.uncovered_kernels(REGISTRY)[1:] == ["common.gpu_kernels: idle_kernel is launched by no version"]


def test_a_version_without_gpu_code_is_a_usage_error():
    with pytest.raises(UsageError, match=r"v1 has no GPU kernels: there is no bench\.gpu"):
        launches.gpu_module(replace(find("v1"), package="bench"))


def test_more_values_than_a_kernel_can_count_are_refused():
    backend = launches.gpu_module(find("v1")).make_backend(runtime=launches.RecordingRuntime("v1"))
    with pytest.raises(ValueError, match="2147483648 values are too many for one launch"):
        backend.launch("a_kernel", 2**31)
