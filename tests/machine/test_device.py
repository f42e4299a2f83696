from types import SimpleNamespace

import pytest
import torch

from common.machine import device as machine
from common.machine.device import has_code_for, require_gpu, require_gpu_per_process, this_machine, unusable_gpu
from common.recipe import UserError

ARCHITECTURES = "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120"  # of torch 2.13.0 for CUDA 13.0 on x86


@pytest.fixture
def fake_gpu(monkeypatch):
    def fake(capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Faked GPU")
        properties = {"total_memory": 24 << 30, "major": capability[0], "minor": capability[1]}
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(**properties))
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ARCHITECTURES.split())

    return fake


@pytest.mark.parametrize(("capability", "dtype"), [((8, 9), torch.bfloat16), ((7, 5), torch.float16)])
def test_pitfall_21_a_gpu_computes_in_bf16_where_it_has_it_else_in_fp16(fake_gpu, capability, dtype):
    fake_gpu(capability)
    found = this_machine.__wrapped__()
    assert (found.is_gpu, found.dtype) == (True, dtype)
    assert "Faked GPU, 24.0 GiB, computing in" in str(found)


@pytest.mark.parametrize(
    ("capability", "needed"),
    [
        (
            (6, 1),
            "has compute capability 6.1, .* has code for 7.5, 8.0, 8.6, 9.0, 10.0, 12.0: .* 7.5 or newer",
        ),  # Pascal
        ((7, 0), "compute capability 7.0, .* what is needed is a card of capability 7.5 or newer"),  # Volta
        ((11, 0), "compute capability 11.0, .* what is needed is a newer torch"),
    ],
)
def test_a_gpu_that_torch_has_no_code_for_is_refused_before_any_download(fake_gpu, monkeypatch, capability, needed):
    fake_gpu(capability)
    with pytest.raises(UserError, match=f"llama needs an NVIDIA GPU: Faked GPU .*{needed}"):
        require_gpu("llama")
    assert not this_machine.__wrapped__().is_gpu  # a recipe for any machine trains on the CPU, and says why
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="not all GPUs can be used: Faked GPU"):
        require_gpu_per_process()


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((7, 5), ARCHITECTURES, True),
        ((8, 9), ARCHITECTURES, True),  # code of 8.0 and 8.6
        ((12, 1), ARCHITECTURES, True),
        ((7, 0), "sm_75", False),
        ((8, 0), "sm_86", False),
        ((8, 0), "sm_75 compute_75", True),  # PTX is compiled for any newer GPU
        ((7, 0), "compute_75", False),
        ((9, 0), "sm_90a", True),
        ((10, 3), "sm_100a", False),
        ((10, 3), "sm_100f", True),
    ],
)
def test_code_runs_on_newer_gpus_of_its_generation_and_ptx_on_all(capability, architectures, runs):
    assert has_code_for(capability, architectures.split()) == runs


def test_every_cpu_computes_in_fp32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = this_machine.__wrapped__()
    assert (found.is_gpu, found.dtype, found.free_bytes()) == (False, torch.float32, 0)
    assert found.peak_bytes() > 100 << 20  # torch alone takes more


def test_without_a_gpu_the_way_out_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine.Path, "exists", lambda _: False)
    monkeypatch.setattr(machine.shutil, "which", lambda _: None)
    assert unusable_gpu() is None
    with pytest.raises(UserError, match="llama needs an NVIDIA GPU: this machine has none .* make finetune MODEL=tiny"):
        require_gpu("llama")


@pytest.mark.parametrize(
    ("cuda", "message"),
    [
        (None, "is a CPU build. Install the CUDA build: rm -rf .venv && make setup"),
        ("13.0", r"driver 550.54.14\), but torch .* needs a driver of the 580 series or newer"),
    ],
)
def test_a_gpu_that_torch_cannot_use_says_why(monkeypatch, cuda, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    answer = type("Answer", (), {"stdout": "550.54.14\n"})()
    monkeypatch.setattr(machine.subprocess, "run", lambda *_, **__: answer)
    with pytest.raises(UserError, match=message):
        require_gpu("llama")


@pytest.mark.parametrize(
    ("exported", "message"),
    [
        ("1", "CUDA_VISIBLE_DEVICES is set, and 1 is no GPU of this machine, which has 0 .NVIDIA GeForce RTX 4090."),
        ("GPU-22bb", "GPU-22bb is no GPU of this machine"),
        ("", "llama needs an NVIDIA GPU: CUDA_VISIBLE_DEVICES= hides those of this machine"),
        ("GPU-11aa", "its driver 580.65.06 is new enough, but CUDA finds none .*. nvidia-smi -L lists what there is"),
        ("0", "its driver 580.65.06 is new enough"),
    ],
)
def test_a_variable_that_shows_no_gpu_is_not_the_drivers_fault(monkeypatch, exported, message):
    def nvidia_smi(command, **_):
        listed = "GPU 0: NVIDIA GeForce RTX 4090 (UUID: GPU-11aa2f6e)\n"
        return SimpleNamespace(stdout=listed if "-L" in command else "580.65.06\n")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(machine.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(machine.subprocess, "run", nvidia_smi)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", exported)
    with pytest.raises(UserError, match=message):
        require_gpu("llama")


def test_a_gpu_that_is_hidden_on_purpose_is_no_fault(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert unusable_gpu() is None


def test_a_broken_nvidia_smi_does_not_hide_the_message(monkeypatch):
    def fail(*_, **__):
        raise OSError("no such file")

    monkeypatch.setattr(machine.subprocess, "run", fail)
    assert machine._driver_version() == "unknown: nvidia-smi fails"
