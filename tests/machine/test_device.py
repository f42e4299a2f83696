import pytest
import torch

from common.machine import device as machine
from common.machine.device import require_gpu, this_machine, unusable_gpu
from common.recipe import UserError


@pytest.fixture
def fake_gpu(monkeypatch):
    def fake(bf16: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Faked GPU")
        properties = type("Properties", (), {"total_memory": 24 << 30})()
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)

    return fake


@pytest.mark.parametrize(("bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_pitfall_21_a_gpu_computes_in_bf16_where_it_has_it_else_in_fp16(fake_gpu, bf16, dtype):
    fake_gpu(bf16)
    found = this_machine.__wrapped__()
    assert (found.is_gpu, found.dtype) == (True, dtype)
    assert "Faked GPU, 24.0 GiB, computing in" in str(found)


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
