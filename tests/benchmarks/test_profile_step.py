"""What the profile counts of torch's events."""

import re
from types import SimpleNamespace

from torch.autograd import DeviceType

from benchmarks.profile_step import describe_profile, kernels_of, kind_of
from tests.conftest import ROOT

GPU, CPU = DeviceType.CUDA, DeviceType.CPU


def event(key: str, device: DeviceType, microseconds: float, annotation: bool = False) -> SimpleNamespace:
    values = {"key": key, "device_type": device, "count": 2, "is_user_annotation": annotation}
    return SimpleNamespace(**values, self_device_time_total=microseconds, self_cpu_time_total=1000.0)


EVENTS = [
    event("nvjet_hsh_256x128", GPU, 600.0),
    event("Memcpy HtoD (Pinned -> Device)", GPU, 50.0),
    event("cudaLaunchKernel", CPU, 600.0),  # torch adds a kernel's time to its launch
    event("Optimizer.step#AdamW.step", GPU, 700.0, annotation=True),  # a range on the GPU's own line
]


def test_on_a_gpu_each_kernel_is_counted_once():
    kernels = kernels_of(EVENTS, on_gpu=True)
    assert [(kernel["kind"], kernel["microseconds"], kernel["calls"]) for kernel in kernels] == [
        ("matmul", 600.0, 2),
        ("copies", 50.0, 2),
    ]
    said = describe_profile({"model": "m", "tokens": 8, "step_microseconds": 1000.0, "kernels": kernels})
    assert [line.split() for line in said.splitlines()[2:5]] == [
        ["60.0%", "matmul"],
        ["35.0%", "gaps"],
        ["5.0%", "copies"],
    ]


def test_on_a_cpu_every_operator_is_counted():
    assert len(kernels_of(EVENTS, on_gpu=False)) == len(EVENTS)


def test_each_kernel_of_the_house_has_its_kind():
    """On a GPU a Triton kernel has the name of its function."""
    sources = [path.read_text() for path in (ROOT / "common" / "kernels").glob("*.py")]
    names = re.findall(r"^@jit\ndef (\w+)\(", "\n".join(sources), re.MULTILINE)
    assert len(names) == 7
    assert {name: kind_of(name) for name in names} == {
        name: "dequantisation" if "dequantize" in name else "our kernels" for name in names
    }
    assert kind_of("void kOptimizerStatic8bit2StateBlockwise<float, 1, 256, 1>(float*)") == "optimizer"
