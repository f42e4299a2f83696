import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from common.machine.device import GIB, Machine
from common.machine.layout import ONE_PROCESS, Layout
from common.model.config import load_config
from common.model.loading import announce_loading, load_4bit, load_tokenizer
from common.recipe import ModelSpec, UserError
from tests.conftest import ARCHITECTURES, FP32, ROOT

BF16 = Machine(torch.device("cpu"), torch.bfloat16, "a test", "CPU")


def four_bit_modules(model) -> dict[str, Linear4bit]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_linear_layer_but_the_head_is_nf4_with_double_quantisation(small_model, architecture):
    model = load_4bit(ModelSpec(str(small_model(architecture))), FP32)
    modules = four_bit_modules(model)
    assert len(modules) == 2 * 7
    for module in modules.values():
        state = module.weight.quant_state
        assert (state.quant_type, state.nested, module.compute_dtype) == ("nf4", True, torch.float32)
    assert type(model.lm_head) is torch.nn.Linear


def test_pitfall_18_nothing_of_the_base_is_kept_in_more_bits_than_the_compute(small_llama):
    model = load_4bit(ModelSpec(str(small_llama)), BF16)
    assert {p.dtype for p in model.parameters()} == {torch.uint8, torch.bfloat16}


def test_16_bit_loads_without_quantisation(small_llama):
    model = load_4bit(ModelSpec(str(small_llama), bits=16), BF16)
    assert not four_bit_modules(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_shards_and_one_file_give_the_same_weights(small_model):
    one = load_4bit(ModelSpec(str(small_model("llama"))), FP32).state_dict()
    several = load_4bit(ModelSpec(str(small_model("llama", max_shard_size="100KB"))), FP32).state_dict()
    assert one.keys() == several.keys()
    assert all(torch.equal(one[name], several[name]) for name in one)


def test_a_checkpoint_that_is_4_bit_already_gives_the_same_logits(small_llama, tmp_path):
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="float32"
    )
    AutoModelForCausalLM.from_pretrained(
        small_llama, quantization_config=quantisation, dtype=torch.float32
    ).save_pretrained(tmp_path)
    ids = torch.arange(10, 30)[None]
    with torch.no_grad():
        stored = load_4bit(ModelSpec(str(tmp_path)), FP32)(ids).logits
        fresh = load_4bit(ModelSpec(str(small_llama)), FP32)(ids).logits
    assert torch.equal(stored, fresh)


def test_another_quantisation_is_refused(small_llama, tmp_path):
    shutil.copytree(small_llama, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="is quantised with gptq; take the original"):
        load_4bit(ModelSpec(str(tmp_path / "model")), FP32)


@pytest.mark.parametrize("weights", ["pretrained", "random"])
def test_a_head_that_is_tied_to_the_embedding_stays_tied(small_model, weights):
    folder = small_model("llama", tie_word_embeddings=True)
    model = load_4bit(ModelSpec(str(folder), weights=weights), FP32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(four_bit_modules(model)) == 2 * 7


def test_a_missing_tensor_is_an_error_not_a_random_weight(small_llama, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(small_llama, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="1 tensors are missing, first model.layers.1.mlp.up_proj.weight"):
        load_4bit(ModelSpec(str(tmp_path / "model")), FP32)


def test_weights_of_another_shape_are_refused(small_llama, tmp_path):
    shutil.copytree(small_llama, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"intermediate_size": 192}))
    with pytest.raises(UserError, match=r"gate_proj is \(128, 64\), the config says \(192, 64\)"):
        load_4bit(ModelSpec(str(tmp_path / "model")), FP32)


def test_random_weights_need_nothing_but_the_config():
    spec = ModelSpec("Qwen/Qwen3-14B", weights="random", layers=1)
    assert load_config(spec).num_hidden_layers == 1
    spec = ModelSpec(str(ROOT / "models" / "tiny"), weights="random", layers=2)
    model = load_4bit(spec, FP32)
    assert len(model.model.layers) == 2
    assert len(four_bit_modules(model)) == 2 * 7
    assert model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.05)  # the config's initializer_range
    assert torch.equal(model.model.norm.weight, torch.ones(192))
    again = load_4bit(spec, FP32)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_random_weights_are_not_those_of_the_folder():
    spec = ModelSpec(str(ROOT / "models" / "tiny"), weights="random")
    assert not torch.equal(load_4bit(spec, FP32).lm_head.weight, load_4bit(ModelSpec(spec.name), FP32).lm_head.weight)


def test_evaluation_does_not_change_the_weights(small_llama):
    # bitsandbytes 0.50 repacks and rounds them in eval mode on a CPU with AVX512-BF16.
    model = load_4bit(ModelSpec(str(small_llama)), FP32)
    before = {name: module.weight.data.clone() for name, module in four_bit_modules(model).items()}
    with torch.no_grad():
        model.eval()(torch.arange(10, 30)[None])
    for name, module in four_bit_modules(model).items():
        assert torch.equal(module.weight.data, before[name])
        assert module.weight.quant_state.nested


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({}, r"loading .*: \d+ files, \d+\.\d MiB, quantized to NF4 as they are read\n"),
        ({"bits": 16}, r"loading .*: \d+ files, \d+\.\d MiB\n"),
        ({"weights": "random"}, r"loading .*: random weights, \d+\.\d MiB, quantized to NF4 as they are drawn\n"),
    ],
)
@pytest.mark.parametrize("layout", [ONE_PROCESS, Layout(2, sharded=True)], ids=str)
def test_what_takes_long_to_load_is_announced(small_model, monkeypatch, capsys, values, line, layout):
    spec = ModelSpec(str(small_model("llama", max_shard_size="100KB")), **values)
    load_4bit(spec, FP32, layout=layout)
    assert capsys.readouterr().out == ""  # it loads in a second
    monkeypatch.setattr("common.model.loading.MIN_ANNOUNCED_BYTES", 1000)
    load_4bit(spec, FP32, layout=layout)
    assert re.fullmatch(line, capsys.readouterr().out)


def test_the_adapter_will_name_the_hub_model_not_the_cache(small_llama):
    assert load_4bit(ModelSpec(str(small_llama)), FP32).name_or_path == str(small_llama)


def test_pitfalls_3_and_6_the_pad_token_is_no_end_of_turn(small_llama, tmp_path):
    shutil.copytree(small_llama, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    for pad in (None, config["eos_token"]):
        path.write_text(json.dumps(config | {"pad_token": pad}))
        tokenizer = load_tokenizer(ModelSpec(str(tmp_path / "model")))
        assert tokenizer.pad_token == "<pad>"
        assert tokenizer.pad_token_id != tokenizer.eos_token_id
        assert tokenizer.pad_token_id < 1024


def test_a_template_of_ones_own(small_llama, tmp_path):
    (tmp_path / "mine.jinja").write_text("{{ messages[0].content }}<|end|>")
    spec = ModelSpec(str(small_llama), chat_template=str(tmp_path / "mine.jinja"))
    assert load_tokenizer(spec).chat_template == "{{ messages[0].content }}<|end|>"
    with pytest.raises(UserError, match="there is no file nowhere.jinja"):
        load_tokenizer(ModelSpec(str(small_llama), chat_template="nowhere.jinja"))


TOOLS = "{{ 'tools' }}"


def with_templates(base, folder, names, where):
    """A copy of a model with its chat template under the first name, and TOOLS under the others."""
    shutil.copytree(base, folder)
    template = (folder / "chat_template.jinja").read_text()
    named = dict.fromkeys(names, TOOLS) | {names[0]: template}
    (folder / "chat_template.jinja").unlink()
    if where == "tokenizer_config.json":
        path = folder / where
        entries = [{"name": name, "template": text} for name, text in named.items()]
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": entries}))
    else:
        (folder / where).mkdir()
        for name, text in named.items():
            path = folder / ("chat_template.jinja" if name == "default" else f"{where}/{name}.jinja")
            path.write_text(text)
    return ModelSpec(str(folder)), template


@pytest.mark.parametrize("where", ["tokenizer_config.json", "additional_chat_templates"])
def test_of_several_templates_the_default_one_is_taken_and_said(small_llama, tmp_path, capsys, where):
    spec, template = with_templates(small_llama, tmp_path / "m", ["default", "tool_use", "rag"], where)
    assert load_tokenizer(spec).chat_template == template
    assert (
        f"of the chat templates of {spec.name} the default one is taken, not rag, tool_use" in capsys.readouterr().out
    )


def test_of_several_templates_without_a_default_none_is_taken(small_llama, tmp_path):
    spec, _ = with_templates(small_llama, tmp_path / "m", ["chat", "tool_use"], "tokenizer_config.json")
    with pytest.raises(UserError, match=r"has 2 chat templates \(chat, tool_use\) and none is the default"):
        load_tokenizer(spec)
    (tmp_path / "mine.jinja").write_text("{{ messages[0].content }}<|end|>")
    chosen = replace(spec, chat_template=str(tmp_path / "mine.jinja"))
    assert load_tokenizer(chosen).chat_template == "{{ messages[0].content }}<|end|>"


def test_a_folder_without_tokenizer_says_so(small_llama, tmp_path):
    shutil.copytree(small_llama, tmp_path / "model", ignore=shutil.ignore_patterns("token*"))
    with pytest.raises(UserError, match="has no tokenizer"):
        load_tokenizer(ModelSpec(str(tmp_path / "model")))


HOST_MEMORY = """
import threading, time
from dataclasses import replace
from pathlib import Path
import torch
from common.machine.layout import Layout
from common.model.loading import load_4bit
from common.recipe import ModelSpec
from tests.conftest import FP32 as machine

def anonymous():  # memory of our own, without pages of files that the kernel can drop
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

peak = anonymous()
done = threading.Event()
def sample():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=sample, daemon=True); thread.start()
model = load_4bit(ModelSpec({name!r}{more}), machine, layout=Layout(on_host={on_host}))
done.set(); thread.join()
print(peak, anonymous())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize(
    ("weights", "on_host"),
    [
        ("pretrained", 0),
        pytest.param("random", 0, marks=pytest.mark.slow),
        pytest.param("pretrained", 16, marks=pytest.mark.slow),  # 6 s: a process of its own
    ],
)
def test_loading_needs_little_more_host_memory_than_the_result(small_model, weights, on_host):
    # 16 layers of 512 x 1536: 100 MB in bf16, 27 MB in 4 bit; the largest tensor has 1.6 MB.
    folder = small_model(
        "llama", max_shard_size="20MB", hidden_size=512, intermediate_size=1536, num_hidden_layers=16, head_dim=128
    )
    more = ", weights='random'" if weights == "random" else ""
    code = HOST_MEMORY.format(name=str(folder), more=more, on_host=on_host)
    # glibc otherwise keeps what was freed, and what stays would seem as large as the peak.
    freed_at_once = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    environment = os.environ | freed_at_once
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True, env=environment
    )
    peak, after = map(int, done.stdout.split()[-2:])
    whole = (folder / "model.safetensors.index.json").read_text()
    bf16_bytes = json.loads(whole)["metadata"]["total_size"]
    assert bf16_bytes > 0.09 * GIB
    # Above what stays: one tensor being quantised, and the allocator's slack.
    assert peak - after < 0.2 * bf16_bytes, f"{(peak - after) / 2**20:.0f} MiB above the result"


@pytest.mark.parametrize(
    ("files", "size", "quantizes", "line"),
    [
        (4, 15 * GIB, True, "loading owner/model: 4 files, 15.00 GiB, quantized to NF4 as they are read\n"),
        (1, 2 * GIB, False, "loading owner/model: 1 file, 2.00 GiB\n"),
        (0, 15 * GIB, True, "loading owner/model: random weights, 15.00 GiB, quantized to NF4 as they are drawn\n"),
        (4, GIB - 1, True, ""),  # is there within a few seconds
    ],
)
def test_a_large_model_is_announced_and_a_small_one_is_not(files, size, quantizes, line, capsys):
    announce_loading(ModelSpec("owner/model"), files, size, quantizes=quantizes)
    assert capsys.readouterr().out == line
