"""Lean decoder layers beside stock ones: same losses, same gradients, same files."""

import copy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from common.data.batches import collate
from common.data.rows import load_rows
from common.kernels import say_references_run
from common.kernels.triton_check import why_no_triton
from common.machine.copy_stream import CopyStream
from common.model import activation_checkpointing, attention
from common.model import lean_layers as modules
from common.model.activation_checkpointing import (
    Policy,
    checkpoint_activations,
    decoder_layers,
    finish_copies,
    long_rows_in_tiles,
    watch_recompute,
)
from common.model.held_adapters import held_adapters
from common.model.lean_layers import is_lean, unsupported_reason, use_lean_layers
from common.model.loading import load_4bit, load_tokenizer
from common.model.lora import attach_lora
from common.model.optimizer import build_optimizer
from common.model.preference_loss import preference_loss
from common.model.weight_streaming import stream_weights
from common.recipe import LoraSpec, ModelSpec, PreferenceSpec, UserError
from common.run.artefacts import save_adapter
from common.run.trainer_config import build_trainer
from common.tokens.labels import IGNORED
from recipes.tiny import RECIPE as TINY_RECIPE
from tests import flash_on_cpu  # noqa: F401  (gives the CPU flash attention's operators)
from tests.allocations import peak_in, watched_allocations
from tests.conftest import ARCHITECTURES, FP32, SMALL
from tests.data.test_batches import flash_attention_in_torch
from tests.poisoned_clock import PoisonedClock
from tests.run.test_training import prepare, split

IDS = torch.arange(10, 74).view(2, 32)
LORA = LoraSpec(rank=4, alpha=8)
POLICIES = {
    "none": Policy(3, 3),
    "every layer": Policy(3),
    "some layers": Policy(3, 1),
    "keep attention": Policy(3, keep_attention=True),
    "offload": Policy(3, offload=True),
}


@pytest.fixture(scope="module")
def folders(small_model):
    return {name: small_model(name, num_hidden_layers=3) for name in ARCHITECTURES}


def adapted(folder, kernels="lean", lora=LORA, bits=4):
    model = attach_lora(load_4bit(ModelSpec(str(folder), bits=bits), FP32), lora)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first: without this no gradient reaches lora_A
            torch.nn.init.normal_(parameter, std=0.05)
        elif "norm.weight" in name:  # one in a new model
            parameter.data = torch.rand_like(parameter) + 0.5
        elif name.endswith("bias"):  # zero in a new model
            torch.nn.init.normal_(parameter, std=0.5)
    use_lean_layers(model, kernels)
    return model


def loss_and_gradients(model, policy=POLICIES["none"]):
    checkpoint_activations(model, policy)
    model.train()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_same(got, expected):
    # fp32, sums in another order: losses to 6 digits, each gradient to 5 of its largest entry
    assert got[0] == pytest.approx(expected[0], rel=1e-6)
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(got[1][name], gradient, rtol=0, atol=1e-5 * gradient.abs().max().item(), msg=name)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_adapter_gradients_are_those_of_stock_peft(folders, architecture, policy):
    folder = folders[architecture]
    expected = loss_and_gradients(adapted(folder, "stock"))
    model = adapted(folder)
    assert is_lean(model)
    assert_same(loss_and_gradients(model, POLICIES[policy]), expected)


@pytest.mark.parametrize(
    ("lora", "bits"),
    [
        (LoraSpec(rank=3, alpha=3), 4),
        (LoraSpec(rank=4, alpha=8, rslora=True), 4),
        (LoraSpec(rank=4, alpha=8, target_modules=("q_proj", "v_proj")), 4),
        (LoraSpec(rank=4, alpha=8, target_modules=("down_proj", "up_proj", "k_proj")), 4),
        (LORA, 16),
    ],
    ids=["scale 1", "rslora", "q and v", "k, up and down", "16 bit"],
)
def test_other_adapters_and_16_bits_give_the_same_too(folders, lora, bits):
    model = adapted(folders["qwen2"], "lean", lora, bits)
    assert is_lean(model)
    assert_same(loss_and_gradients(model), loss_and_gradients(adapted(folders["qwen2"], "stock", lora, bits)))


def tiny_losses(kernels: str, steps: int) -> list[float]:
    """Of the tiny recipe's model on its data, one row an optimizer step."""
    recipe = TINY_RECIPE
    tokenizer = load_tokenizer(recipe.model)
    rows = load_rows(replace(recipe.data, eval_source=None, eval_rows=0), tokenizer, recipe.train.seq_len).train
    model = attach_lora(load_4bit(recipe.model, FP32), recipe.lora)
    use_lean_layers(model, kernels)
    checkpoint_activations(model.train(), Policy(4, 2))
    optimizer = build_optimizer(model, replace(recipe.train, learning_rate=1e-3))
    losses = []
    loader = DataLoader(rows, 1, collate_fn=lambda batch: collate(batch, tokenizer.pad_token_id))
    for _, batch in zip(range(steps), loader, strict=False):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
def test_after_200_steps_the_tiny_model_has_learnt_the_same():
    lean, stock = tiny_losses("lean", 200), tiny_losses("stock", 200)
    assert len(lean) == 200
    assert lean[0] == pytest.approx(stock[0], rel=1e-6)
    assert sum(stock[-20:]) / 20 < 0.1 * stock[0]
    # fp32 rounds to 6e-8, and what it rounds away grows as training goes on: to 2e-5 nats here.
    assert max(abs(a - b) for a, b in zip(lean, stock, strict=True)) < 1e-3


def test_no_token_sees_another_example_of_its_row(folders):
    """Changing the first example moves no logit of the second, nor the gradient that its loss gives."""
    model = adapted(folders["qwen3"])
    loss_and_gradients(model)
    positions = torch.arange(16).repeat(2)[None]
    first, second = IDS.view(1, 64)[:, :32], IDS.view(1, 64)[:, :32].clone()
    second[0, :16] = 99
    labels = torch.full((1, 32), -100)
    labels[0, 17:] = 5
    found = []
    for ids in (first, second):
        model.zero_grad()
        model(input_ids=ids, position_ids=positions, labels=labels).loss.backward()
        with torch.no_grad():
            logits = model(input_ids=ids, position_ids=positions).logits[:, 16:]
        found.append((logits, {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}))
    assert torch.equal(found[0][0], found[1][0])
    for name, gradient in found[0][1].items():  # of other tokens nothing but zeros is added
        torch.testing.assert_close(found[1][1][name], gradient, rtol=0, atol=1e-7)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_rows_laid_flat_give_the_loss_and_gradients_of_a_rectangle(folders, architecture, monkeypatch):
    """As on a GPU, but for the kernel of its attention, which tests/test_gpu.py compares with float64."""
    monkeypatch.setattr(attention, "varlen_attn", flash_attention_in_torch)
    labels = [IGNORED if i in (0, 20) else 10 + i for i in range(32)]  # no example predicts the next one's first token
    row = {"input_ids": list(range(10, 42)), "labels": labels, "seq_lengths": [20, 12]}
    rows = [row, {name: values[:9] for name, values in row.items()} | {"seq_lengths": [9]}]
    found = []
    for name in ("sdpa", attention.PACKED_ATTENTION):
        model = adapted(folders[architecture]).train()
        model.set_attn_implementation(name)
        model(**collate(rows, 0, padding_free=name == attention.PACKED_ATTENTION)).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=1e-5 * gradient.abs().max().item(), msg=name)


def test_names_are_those_of_the_stock_model_and_the_adapter_loads_in_plain_peft(folders, tmp_path):
    lean, stock = adapted(folders["mistral"]), adapted(folders["mistral"], "stock")
    assert list(lean.state_dict()) == list(stock.state_dict())
    assert [name for name, _ in lean.named_modules()] == [name for name, _ in stock.named_modules()]
    assert all(isinstance(a, type(b)) for a, b in zip(lean.modules(), stock.modules(), strict=True))
    for name, model in (("lean", lean), ("stock", stock)):
        save_adapter(model, tmp_path / name)
    saved = load_file(tmp_path / "lean" / "adapter_model.safetensors")
    expected = load_file(tmp_path / "stock" / "adapter_model.safetensors")
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in saved)
    base = AutoModelForCausalLM.from_pretrained(
        folders["mistral"], quantization_config=stock.config.quantization_config, dtype=torch.float32
    )
    for name, parameter in base.named_parameters():
        if "norm.weight" in name:
            parameter.data = dict(lean.get_base_model().named_parameters())[name].data
    # In training mode: bitsandbytes 0.50 rounds its scales in eval mode on some CPUs.
    plain = PeftModel.from_pretrained(base, tmp_path / "lean").train()
    with torch.no_grad():
        torch.testing.assert_close(plain(IDS).logits, lean.eval()(IDS).logits, rtol=0, atol=1e-4)


def test_generation_goes_through_the_stock_pass_with_the_same_tokens(folders, monkeypatch):
    lean, stock = (adapted(folders["llama"], kernels).eval() for kernels in ("lean", "stock"))
    monkeypatch.setattr(modules, "rms_norm_lora_linears", lambda *_: pytest.fail("a pass with a cache is a stock pass"))
    arguments = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "use_cache": True}
    mask = torch.ones_like(IDS)
    got, expected = (model.generate(IDS, attention_mask=mask, **arguments) for model in (lean, stock))
    assert torch.equal(got, expected)


def test_without_its_adapter_and_with_a_merged_one_the_model_is_what_it_is_in_peft(folders):
    lean, stock = (adapted(folders["qwen2"], kernels, bits=16).eval() for kernels in ("lean", "stock"))
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(lean(IDS).logits, stock(IDS).logits, rtol=0, atol=1e-4)
            with lean.disable_adapter(), stock.disable_adapter():
                torch.testing.assert_close(lean(IDS).logits, stock(IDS).logits, rtol=0, atol=1e-4)
            lean.merge_adapter(), stock.merge_adapter()


@pytest.mark.parametrize(
    ("lora", "reason"),
    [
        (LoraSpec(4, 8, dropout=0.1), "they have no LoRA dropout"),
        (LoraSpec(4, 8, dora=True), "they know plain LoRA only (no DoRA)"),
    ],
)
def test_what_the_lean_layers_cannot_do_stays_stock_and_says_why(folders, lora, reason, capsys):
    model = adapted(folders["llama"], "lean", lora)
    assert not is_lean(model)
    assert f"layers: stock, slower and with more memory, because {reason}\n" in capsys.readouterr().out


def test_another_architecture_stays_stock():
    config = LlamaConfig(**SMALL | {"hidden_act": "gelu"})
    model = LlamaForCausalLM(config)
    assert unsupported_reason(model) == "the lean layers know SiLU and GELU by tanh, not GELUActivation"
    for layer in decoder_layers(model):
        layer.__class__ = type("OtherLayer", (type(layer),), {})
    assert unsupported_reason(model) == "there are no lean layers for llama"


def test_without_triton_a_gpu_run_says_so_in_a_line(folders, monkeypatch, capsys):
    model = adapted(folders["llama"], "stock")
    monkeypatch.setitem(sys.modules, "triton.runtime", None)
    for asked in (why_no_triton, say_references_run):
        asked.cache_clear()
    use_lean_layers(model, "lean")
    assert capsys.readouterr().out == ""  # a CPU needs none
    monkeypatch.setattr(type(model), "device", torch.device("cuda"), raising=False)
    for _ in range(2):  # says it once
        use_lean_layers(model, "lean")
    why_no_triton.cache_clear()
    out = capsys.readouterr().out
    assert out.count("in plain PyTorch operators, slower and with more memory, because Triton is not installed") == 1


@pytest.mark.parametrize("kernels", ["lean", "stock"])
def test_a_run_whose_layers_are_not_what_was_planned_does_not_start(recipe, kernels):
    other = {"lean": "stock", "stock": "lean"}[kernels]
    recipe = replace(recipe, train=replace(recipe.train, kernels=kernels))
    model, tokenizer, rows, _, plan = prepare(recipe, split(recipe, 2))
    wanted = replace(recipe, train=replace(recipe.train, kernels=other))
    with pytest.raises(UserError, match=f"the layers are not {other}, as TrainSpec.kernels says: remove the call"):
        build_trainer(model, tokenizer, rows, wanted, plan, Path(recipe.out))


# Long rows: layers in tiles ----------------------------------------------------------------------------------------

LENGTHS = [60, 21, 7, 40]  # of the examples of a packed row: with tiles of 32 tokens they end inside of tiles
WAYS = {
    "every layer": Policy(3),
    "tiles": Policy(3, tile=32),
    "tiles, offload": Policy(3, tile=32, offload=True),
    "by head": Policy(3, tile=32, by_head=True),
    "by head, keep attention": Policy(3, tile=32, by_head=True, keep_attention=True),
    "by head, offload": Policy(3, tile=48, by_head=True, offload=True),
    "by head, one tile": Policy(3, tile=1000, by_head=True),
    "q, k, v again": Policy(3, tile=32, by_head=True, qkv_again=True),
    "q, k, v again, keep attention, offload": Policy(3, False, True, True, tile=48, by_head=True, qkv_again=True),
}


def packed_row():
    """A row of several examples in which not every token is trained."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 1000, (sum(LENGTHS),), generator=generator)
    labels = torch.where(torch.rand(len(ids), generator=generator) < 0.4, IGNORED, ids)
    labels[torch.tensor([0, *LENGTHS[:-1]]).cumsum(0)] = IGNORED
    return {"input_ids": ids.tolist(), "labels": labels.tolist(), "seq_lengths": LENGTHS}


def of_packed_row(model, policy):
    """The loss and the gradients; the layers are seen to recompute as the policy says."""
    checkpoint_activations(model.train(), policy)
    batch = collate([packed_row()], 0, padding_free=model.config._attn_implementation == attention.PACKED_ATTENTION)
    with watch_recompute(model) as watch:
        loss = model(**batch).loss
        loss.backward()
    watch.verify(policy)
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def packed(folder, lora=LORA, bits=16):
    model = adapted(folder, "lean", lora, bits)
    model.set_attn_implementation(attention.PACKED_ATTENTION)
    return model


@pytest.mark.parametrize("case", [*modules.TILED_MODEL_TYPES, "mistral with a window"])
def test_every_way_of_a_long_row_gives_the_gradients_of_the_stock_layers_in_float64(case, folders, small_model):
    folder = folders.get(case) or small_model("mistral", num_hidden_layers=3, sliding_window=16)
    stock = copy.deepcopy(adapted(folder, "stock", bits=16)).double()
    expected = of_packed_row(stock, POLICIES["none"])
    assert {gradient.dtype for gradient in expected[1].values()} == {torch.float64}
    for way, policy in WAYS.items():
        loss, gradients = of_packed_row(packed(folder), policy)
        assert loss == pytest.approx(expected[0], rel=1e-6), way
        for name, gradient in expected[1].items():
            assert (gradients[name] - gradient).abs().max() < 1e-5 * gradient.abs().max(), (way, name)


@pytest.mark.parametrize(
    ("lora", "bits"),
    [
        (LoraSpec(rank=3, alpha=3), 4),
        (LoraSpec(rank=4, alpha=8, target_modules=("q_proj", "v_proj")), 4),
        (LoraSpec(rank=4, alpha=8, target_modules=("down_proj", "up_proj", "k_proj")), 4),
        (LoraSpec(rank=4, alpha=8, target_modules=("o_proj",)), 16),
    ],
    ids=["4 bit", "q and v", "k, up and down", "o"],
)
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])  # with biases, and with norms of heads
def test_other_adapters_and_4_bits_give_the_same_in_tiles(folders, architecture, lora, bits):
    expected = of_packed_row(packed(folders[architecture], lora, bits), WAYS["every layer"])
    assert_same(of_packed_row(packed(folders[architecture], lora, bits), WAYS["tiles"]), expected)
    assert_same(of_packed_row(packed(folders[architecture], lora, bits), WAYS["by head"]), expected)
    assert_same(of_packed_row(packed(folders[architecture], lora, bits), WAYS["q, k, v again"]), expected)


@pytest.mark.parametrize("way", ["tiles", "by head, offload"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_a_loss_that_learns_from_preferences_is_the_same_in_tiles_with_weights_on_the_host(folders, architecture, way):
    """It scales each token's gradient, which tiles write over the hidden states; weights come beside each layer."""
    row = packed_row() | {"signs": [1.0, -1.0] * 2, "reference": [-200.0, -90.0, -20.0, -150.0]}
    found = []
    for policy, on_host in ((WAYS["every layer"], 0), (WAYS[way], 0), (WAYS[way], 3)):
        model = packed(folders[architecture], bits=4)
        stream_weights(model, on_host)
        checkpoint_activations(model.train(), policy)
        result = preference_loss(model, collate([row], 0, padding_free=True), PreferenceSpec(sft_weight=0.5))
        result.loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        found.append((result.loss.item(), gradients))
    assert_same(found[1], found[0])
    assert found[2][0] == found[1][0]
    assert all(torch.equal(found[2][1][name], gradient) for name, gradient in found[1][1].items())


@pytest.mark.parametrize(
    ("way", "on_host"), [("tiles, offload", 0), ("by head, offload", 0), ("by head, offload", 3), ("by head", 3)]
)
def test_copies_beside_layers_in_tiles_may_happen_whenever_they_can(folders, way, on_host):
    """By head a layer's input returns when attention's backward is done, not earlier; weights return beside it."""
    model = packed(folders["llama"], bits=4)
    expected = of_packed_row(model, WAYS[way])
    with PoisonedClock() as clock:
        stream_weights(model, on_host)
        for _ in range(2):
            model.zero_grad()
            found = of_packed_row(model, WAYS[way])
        finish_copies(model)
        torch.cuda.synchronize()
    assert clock.copies >= (6 if "offload" in way else 3)
    assert found[0] == expected[0]
    assert all(torch.equal(found[1][name], gradient) for name, gradient in expected[1].items())


def test_a_wait_that_is_missing_beside_layers_in_tiles_is_noticed(folders, monkeypatch):
    model = packed(folders["llama"], bits=4)
    monkeypatch.setattr(CopyStream, "wait", lambda _: None)
    # A layer's input is dropped while its copy to the device is still to come.
    with pytest.raises(AssertionError, match="memory was freed while a copy into it was under way"):
        with PoisonedClock(), np.errstate(all="ignore"):
            of_packed_row(model, WAYS["by head, offload"])
            finish_copies(model)


def test_adapters_that_are_held_give_the_same_bits_in_tiles(folders):
    model = packed(folders["qwen3"], bits=4)
    expected = of_packed_row(model, WAYS["by head"])
    model.zero_grad()
    held_adapters(model).hold()
    got = of_packed_row(model, WAYS["by head"])
    assert held_adapters(model).tensors()
    assert all(torch.equal(got[1][name], gradient) for name, gradient in expected[1].items())


def test_after_tiles_a_model_computes_as_before_bit_for_bit(folders):
    model = packed(folders["llama"], bits=4)
    found = []
    for way in ("every layer", "by head, offload", "every layer"):
        model.zero_grad()
        found.append(of_packed_row(model, WAYS[way]))
    assert found[0][0] == found[2][0]
    assert all(torch.equal(found[2][1][name], gradient) for name, gradient in found[0][1].items())


def test_logits_and_held_out_loss_are_the_same_in_tiles(folders):
    """Without gradients nothing may be written over, and without labels the last norm belongs to the model."""
    model = packed(folders["qwen3"])
    batch = collate([packed_row()], 0, padding_free=True)
    found = []
    for way in ("every layer", "by head"):
        checkpoint_activations(model.eval(), WAYS[way])
        with torch.no_grad():
            inputs = {name: value for name, value in batch.items() if name not in ("labels", "trained_positions")}
            found.append((model(**batch).loss, model(**inputs).logits))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


def test_tiles_are_refused_where_the_layers_cannot():
    with pytest.raises(ValueError, match="layers in tiles all recompute"):
        Policy(3, 1, tile=32)
    with pytest.raises(ValueError, match="layers in tiles all recompute"):
        Policy(3, by_head=True)
    with pytest.raises(ValueError, match="only attention by key/value head computes queries, keys and values again"):
        Policy(3, tile=32, qkv_again=True)


def test_layers_that_become_lean_later_compute_in_tiles_then(folders):
    """As in a recipe's story, where train makes them lean."""
    expected = of_packed_row(packed(folders["llama"]), WAYS["by head"])
    model = adapted(folders["llama"], "stock", bits=16)
    model.set_attn_implementation(attention.PACKED_ATTENTION)
    checkpoint_activations(model.train(), WAYS["by head"])
    use_lean_layers(model, "lean")
    model(**collate([packed_row()], 0, padding_free=True)).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, expected[1][name])


@pytest.mark.parametrize(
    ("architecture", "dropout", "implementation"),
    [("llama", 0.1, attention.PACKED_ATTENTION), ("llama", 0.0, "sdpa"), ("gemma3_text", 0.0, "packed")],
)
def test_tiles_are_refused_where_they_compute_something_else(folders, architecture, dropout, implementation):
    """LoRA dropout, an attention with a mask, and layers with other norms."""
    model = adapted(folders[architecture], "stock", LoraSpec(4, 8, dropout=dropout))
    model.set_attn_implementation(implementation)
    with pytest.raises(ValueError, match="only lean layers with packed attention can compute in tiles"):
        checkpoint_activations(model, WAYS["tiles"])


def test_rows_that_are_evaluated_go_in_tiles_where_they_are_long_and_take_less(folders, monkeypatch):
    monkeypatch.setattr(activation_checkpointing, "MAX_WHOLE_TOKENS", 100)
    monkeypatch.setattr(activation_checkpointing, "TILE_WITHOUT_GRADIENTS", 32)
    model = packed(folders["llama"], bits=4).eval()
    row = packed_row()
    row["labels"] = [IGNORED] * (len(row["labels"]) - 1) + row["labels"][-1:]  # one row of logits, which takes little
    row["labels"][-1] = row["input_ids"][-1]
    batch, losses, peaks = collate([row], 0, padding_free=True), [], []
    for longest in (100, sum(LENGTHS), 100):  # as ever, in tiles, and as ever again
        with torch.no_grad(), long_rows_in_tiles(model, longest), watched_allocations() as profiler:
            losses.append(model(**batch).loss)
        peaks.append(peak_in(profiler))
    assert torch.equal(losses[0], losses[2]) and peaks[0] == peaks[2]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)
    assert peaks[1] < 0.9 * peaks[0]  # the rest is what one layer dequantizes, and the row itself
