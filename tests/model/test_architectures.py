import json
from dataclasses import fields
from typing import Any

import pytest
import torch
from gguf import MODEL_ARCH_NAMES
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, PretrainedConfig

from common.data.batches import collate
from common.model import attention
from common.model.architectures import ARCHITECTURES
from common.model.config import NOT_HANDLED, load_config
from common.model.lean_layers import LEAN_CLASS_OF, is_lean
from common.recipe import ModelSpec, UserError
from tests.conftest import ARCHITECTURES as TESTED
from tests.conftest import ROOT, SMALL, SMALL_BESIDES
from tests.data.test_batches import flash_attention_in_torch
from tests.model.test_lean_layers import adapted, assert_same, loss_and_gradients

# Each field of a config is in one of these or in NOT_HANDLED: a version of transformers that adds one fails a test.
UNREAD = {  # by the forward pass in training and by the loss
    *("initializer_range", "use_cache", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
    "pretraining_tp",  # of Llama: nothing in transformers 5 reads it
    *("use_sliding_window", "max_window_layers"),  # of Qwen: they make layer_types
}
SIZES = {  # of parameters: the plan's counts and every test that loads a model
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "tie_word_embeddings"),
}
ROPE = {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0}
OTHER: dict[str, Any] = {  # values that change the loss
    "rms_norm_eps": 0.1,
    "rope_parameters": ROPE,
    "attention_bias": True,
    "mlp_bias": True,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "silu",
    "sliding_window": 4,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    "query_pre_attn_scalar": 64,
}
OTHER_OF = {
    ("gemma3_text", "rope_parameters"): {"full_attention": ROPE, "sliding_attention": {"rope_type": "default"}},
    **{(qwen, "sliding_window"): None for qwen in ("qwen2", "qwen3")},  # their layer_types decide; tested with these
}
WITH = {  # what else it takes for a field to have an effect
    ("qwen2", "layer_types"): {"use_sliding_window": True, "sliding_window": 8},
    ("qwen3", "layer_types"): {"use_sliding_window": True, "sliding_window": 8},
}
DROPOUT = "attention_dropout"  # in stock attention on a CPU; packed attention refuses it


def own_fields(model_type: str) -> set[str]:
    config_class, _ = TESTED[model_type]
    return {field.name for field in fields(config_class)} - {field.name for field in fields(PretrainedConfig)}


def test_every_architecture_of_the_table_is_tested():
    assert ARCHITECTURES.keys() == TESTED.keys()


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=lambda architecture: architecture.model_type)
def test_a_line_names_what_transformers_and_gguf_have(architecture):
    config_class, model_class = TESTED[architecture.model_type]
    model = model_class(config_class(**SMALL))
    assert model.config.model_type == architecture.model_type
    layer = model.model.layers[0]
    for part, module in (("DecoderLayer", layer), ("Attention", layer.self_attn), ("MLP", layer.mlp)):
        assert architecture.layer_class(part) is type(module)
        assert issubclass(LEAN_CLASS_OF[type(module)], type(module))
    assert architecture.gguf_name in MODEL_ARCH_NAMES.values()


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_field_of_a_config_is_known(model_type):
    known = UNREAD | SIZES | OTHER.keys() | NOT_HANDLED.keys() | {DROPOUT}
    assert own_fields(model_type) <= known


def fields_that_change_the_loss() -> list[tuple[str, str]]:
    pairs = [(model_type, field) for model_type in ARCHITECTURES for field in sorted(own_fields(model_type))]
    return [(a, field) for a, field in pairs if field in OTHER and OTHER_OF.get((a, field), True) is not None]


@pytest.mark.parametrize(("model_type", "field"), fields_that_change_the_loss())
def test_a_field_changes_lean_layers_as_it_changes_stock_ones(small_model, model_type, field, monkeypatch):
    """In rectangles and in rows laid flat."""
    value = OTHER_OF.get((model_type, field), OTHER[field])
    besides = WITH.get((model_type, field), {})
    folder = small_model(model_type, num_hidden_layers=3, **besides | {field: value})
    stock, lean = (loss_and_gradients(adapted(folder, kernels, bits=16)) for kernels in ("stock", "lean"))
    assert_same(lean, stock)
    plain = loss_and_gradients(adapted(small_model(model_type, num_hidden_layers=3), bits=16))
    assert abs(plain[0] - stock[0]) > 1e-5
    monkeypatch.setattr(attention, "varlen_attn", flash_attention_in_torch)
    row = {"input_ids": list(range(10, 42)), "labels": list(range(10, 42)), "seq_lengths": [32]}
    losses = []
    for name in ("sdpa", attention.PACKED_ATTENTION):
        model = adapted(folder, bits=16).train()
        assert is_lean(model)
        model.set_attn_implementation(name)
        losses.append(model(**collate([row], 0, padding_free=name == attention.PACKED_ATTENTION)).loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("field", NOT_HANDLED)
def test_a_field_that_is_not_handled_is_refused(small_model, field):
    folder = small_model("gemma3_text")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {field: 30.0 if "cap" in field else True}))
    with pytest.raises(UserError, match=f"has {field} .* in its config.json, which no code here handles"):
        load_config(ModelSpec(str(folder)))


def test_attention_dropout_is_not_passed_over_in_silence():
    with pytest.raises(ValueError, match="packed attention has no dropout"):
        attention.packed_attention(torch.nn.Module(), *[torch.zeros(1, 2, 3, 4)] * 3, None, dropout=0.1,
                                   cu_seq_lens_q=torch.tensor([0, 3]), max_length_q=3)  # fmt: skip


def test_a_model_that_reads_pictures_is_refused_and_its_text_part_is_not(tmp_path, monkeypatch):
    """The program of docs/new_architecture.md, as it stands there."""
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    text = SMALL | SMALL_BESIDES["gemma3_text"]
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    Gemma3ForConditionalGeneration(config).bfloat16().save_pretrained(tmp_path / "whole")
    whole = Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "whole", dtype=torch.float32).eval()
    with pytest.raises(UserError, match="reads pictures too .type 'gemma3'., and the recipes train text alone"):
        load_config(ModelSpec(str(tmp_path / "whole")))
    page = (ROOT / "docs" / "new_architecture.md").read_text()
    program = page.split("```python\n")[1].split("```")[0]
    for line in ("google/gemma-3-4b-it", "gemma-3-4b-text"):
        assert line in program
    program = program.replace("google/gemma-3-4b-it", str(tmp_path / "whole")).replace("gemma-3-4b-text", "text")
    monkeypatch.chdir(tmp_path)
    exec("\n".join(line for line in program.splitlines() if "AutoTokenizer." not in line))
    assert load_config(ModelSpec("text")).model_type == "gemma3_text"
    model = adapted(tmp_path / "text", bits=16).get_base_model().float().eval()
    ids = torch.arange(10, 42)[None]
    for name, parameter in model.named_parameters():  # `adapted` draws norms and adapters
        if "lora_B" in name:
            parameter.data.zero_()
        elif "norm.weight" in name:
            parameter.data = whole.model.language_model.get_parameter(name.removeprefix("model."))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, whole(input_ids=ids).logits, rtol=0, atol=1e-4)
