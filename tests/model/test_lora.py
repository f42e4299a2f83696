import pytest
import torch

from common.model.config import load_config, lora_parameters
from common.model.loading import load_4bit
from common.model.lora import attach_lora, trainable_params
from common.recipe import ALL_LINEAR, LoraSpec, ModelSpec, UserError
from tests.conftest import ARCHITECTURES, FP32

IDS = torch.arange(10, 30)[None]


def base(folder, machine=FP32):
    return load_4bit(ModelSpec(str(folder)), machine)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_adapters_sit_on_every_linear_layer_in_fp32_and_nothing_else_is_trained(small_model, architecture):
    model = attach_lora(base(small_model(architecture)), LoraSpec(rank=4, alpha=8))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    assert {name.split(".")[-4] for name in trained} == set(ALL_LINEAR)
    # 2 layers * rank 4 * (in + out over 7 projections): q, o 64+64; k, v 64+32; gate, up, down 64+128
    assert trainable_params(model) == 2 * 4 * (2 * 128 + 2 * 96 + 3 * 192)


def test_outputs_are_unchanged_before_the_first_step(small_llama):
    model = base(small_llama).eval()
    with torch.no_grad():
        before = model(IDS).logits
        assert torch.equal(attach_lora(model, LoraSpec(rank=4, alpha=8)).eval()(IDS).logits, before)


def test_the_seed_decides_the_adapter(small_llama):
    def first_a(seed: int) -> torch.Tensor:
        model = attach_lora(base(small_llama), LoraSpec(rank=4, alpha=8), seed)
        return next(p for name, p in model.named_parameters() if "lora_A" in name)

    assert torch.equal(first_a(1), first_a(1))
    assert not torch.equal(first_a(1), first_a(2))


@pytest.mark.parametrize(("rslora", "scale"), [(False, 8 / 4), (True, 8 / 4**0.5)])
def test_the_scale_is_alpha_over_rank_or_over_its_root(small_llama, rslora, scale):
    model = attach_lora(base(small_llama), LoraSpec(rank=4, alpha=8, rslora=rslora))
    assert model.base_model.model.model.layers[0].mlp.up_proj.scaling["default"] == pytest.approx(scale)


def test_dora_adds_a_magnitude_a_row(small_llama):
    model = attach_lora(base(small_llama), LoraSpec(rank=4, alpha=8, dora=True))
    magnitudes = [p for name, p in model.named_parameters() if "magnitude" in name]
    assert len(magnitudes) == 2 * 7
    assert all(p.requires_grad and p.dtype == torch.float32 for p in magnitudes)


def test_a_missing_target_module_is_named(small_llama):
    with pytest.raises(UserError, match="names qkv_proj, which this model does not have; its linear modules are down_"):
        attach_lora(base(small_llama), LoraSpec(rank=4, alpha=8, target_modules=("q_proj", "qkv_proj")))


def test_pitfall_19_small_updates_move_fp32_adapters_and_not_bf16_ones():
    def unmoved(dtype: torch.dtype) -> float:
        torch.manual_seed(0)
        weight = (torch.rand(16, 64) * 2 - 1).mul_(64**-0.5).to(dtype)  # lora_A's initial values
        start = weight.clone()
        parameter = torch.nn.Parameter(weight)
        optimizer = torch.optim.AdamW([parameter], lr=2e-5, weight_decay=0)
        for _ in range(100):
            parameter.grad = torch.randn(16, 64).to(dtype)
            optimizer.step()
        return (parameter == start).float().mean().item()

    assert unmoved(torch.float32) == 0
    assert unmoved(torch.bfloat16) > 0.3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("lora", [LoraSpec(4, 8), LoraSpec(6, 8, target_modules=("q_proj", "v_proj", "down_proj"))])
def test_the_config_tells_how_many_parameters_adapters_have(small_model, architecture, lora):
    folder = small_model(architecture)
    config = load_config(ModelSpec(str(folder)))
    assert lora_parameters(config, lora) == trainable_params(attach_lora(base(folder), lora))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("meta-llama/Meta-Llama-3-8B-Instruct", 41_943_040),  # 32 layers * rank 16 * 81,920 (in + out of 7 projections)
        ("Qwen/Qwen3-14B", 64_225_280),  # 40 layers * rank 16 * 100,352
    ],
)
def test_parameters_of_rank_16(name, parameters):
    config = load_config(ModelSpec(name))
    assert lora_parameters(config, LoraSpec(16, 32)) == parameters
    assert lora_parameters(config, LoraSpec(16, 32, dora=True)) == parameters  # magnitudes do not grow with the rank
    assert lora_parameters(config, LoraSpec(16, 32, target_modules=("q_proj", "qkv_proj"))) < parameters
