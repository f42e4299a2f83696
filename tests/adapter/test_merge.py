import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from gguf.quants import dequantize as dequantize_gguf
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from common.adapter import merge_check
from common.adapter.find import find_adapter
from common.adapter.gguf import GgufModel
from common.adapter.load import trained_tokenizer
from common.adapter.merge import MergedWeights, write_merged
from common.adapter.merge_check import KL_BOUND, check_merged, compare, encode_check_prompts
from common.cli import run_command
from common.machine.disk import MADE_FROM
from common.model.loading import load_4bit
from common.recipe import LoraSpec, Recipe, UserError
from tests.conftest import ARCHITECTURES, FP32, MIXED, NESTED

IDS = torch.arange(5, 45)[None]
LORAS = {
    "lora": LoraSpec(rank=4, alpha=8),
    "rslora": LoraSpec(rank=16, alpha=8, rslora=True),
    "dora": LoraSpec(rank=4, alpha=8, dora=True),
    "attention alone": LoraSpec(rank=4, alpha=8, target_modules=("q_proj", "v_proj")),
}


def merged(recipe: Recipe, folder: Path, *, original: bool = False) -> Path:
    folder.mkdir(exist_ok=True)
    write_merged(MergedWeights(find_adapter(recipe), original=original), folder)
    return folder


def logits(folder: Path, **arguments: object) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **arguments).eval()(IDS).logits


def trained_logits(recipe: Recipe) -> torch.Tensor:
    """Of the 4-bit base with the adapter on it, as plain bitsandbytes and PEFT compute them."""
    with torch.no_grad():
        return PeftModel.from_pretrained(load_4bit(recipe.model, FP32), recipe.out).eval()(IDS).logits


def divergence(trained: torch.Tensor, other: torch.Tensor) -> float:
    p, q = (states.double().log_softmax(-1) for states in (trained, other))
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS)
def test_pitfall_25_the_merged_model_is_the_trained_one(adapted, tmp_path, architecture, lora):
    """In plain transformers, beside plain bitsandbytes and PEFT: KL at most 1e-5, against 1e-3 for the base alone."""
    recipe = adapted(architecture, lora)
    trained = trained_logits(recipe)
    base = logits(Path(recipe.model.name))
    assert divergence(trained, base) > 1e-3
    assert divergence(trained, logits(merged(recipe, tmp_path))) <= KL_BOUND


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_the_merged_model_is_what_the_libraries_make_of_base_and_adapter(adapted, tmp_path, architecture):
    """No function of ours loads the model that it is compared with: plain transformers, bitsandbytes and PEFT do."""
    recipe = adapted(architecture)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **NESTED)
    plain = AutoModelForCausalLM.from_pretrained(
        recipe.model.name, dtype=torch.float32, quantization_config=settings, device_map={"": "cpu"}
    )
    for module in plain.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False  # else bitsandbytes rounds: common.model.nf4.keep_packed_form
    with torch.no_grad():
        trained = PeftModel.from_pretrained(plain, recipe.out).eval()(IDS).logits
    assert divergence(trained, logits(Path(recipe.model.name))) > 1e-3
    assert divergence(trained, logits(merged(recipe, tmp_path))) <= KL_BOUND


def test_the_original_base_is_further_from_what_was_trained(adapted, tmp_path):
    recipe = adapted("llama")
    trained = trained_logits(recipe)
    of_4bit = divergence(trained, logits(merged(recipe, tmp_path / "a")))
    of_original = divergence(trained, logits(merged(recipe, tmp_path / "b", original=True)))
    assert of_original > 20 * of_4bit


def test_merging_into_the_original_is_what_peft_does(adapted, tmp_path):
    recipe = adapted("qwen2")
    base = AutoModelForCausalLM.from_pretrained(recipe.model.name, dtype=torch.float32)
    peft_merged = PeftModel.from_pretrained(base, recipe.out).merge_and_unload()
    ours = load_file(merged(recipe, tmp_path, original=True) / "model.safetensors")
    for name, tensor in peft_merged.state_dict().items():
        assert torch.equal(ours[name], tensor.bfloat16()), name


@pytest.mark.parametrize("values", [{}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
def test_files_dtypes_and_sizes_are_those_of_the_base(adapted, small_model, tmp_path, values):
    base = small_model("qwen3", max_shard_size="100KB", **values)
    folder = merged(adapted("qwen3", base=base), tmp_path)
    files = sorted(path.name for path in base.glob("model*"))
    assert len(files) > 3 and files == sorted(path.name for path in folder.glob("model*"))
    for file in files:
        if file.endswith(".safetensors"):
            assert (folder / file).stat().st_size == (base / file).stat().st_size
            before, after = load_file(base / file), load_file(folder / file)
            assert {n: (t.dtype, t.shape) for n, t in before.items()} == {
                n: (t.dtype, t.shape) for n, t in after.items()
            }
    index = "model.safetensors.index.json"
    weight_map = json.loads((base / index).read_text())["weight_map"]
    assert json.loads((folder / index).read_text())["weight_map"] == weight_map
    assert torch.isfinite(logits(folder)).all()


def test_what_no_adapter_touches_stays_as_it_was(adapted, tmp_path):
    recipe = adapted("llama", LORAS["attention alone"])
    before = load_file(Path(recipe.model.name) / "model.safetensors")
    after = load_file(merged(recipe, tmp_path) / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(before[name], after[name])


def test_tokenizer_template_and_generation_config_come_along(adapted, tmp_path):
    recipe = adapted("llama")
    (Path(recipe.out) / "chat_template.jinja").write_text("{{ 'the template of the run' }}")
    folder = merged(recipe, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("I will.")["input_ids"] == AutoTokenizer.from_pretrained(recipe.out)("I will.")["input_ids"]
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "the template of the run"
    )
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2]
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "quantization_config" not in config
    note = json.loads((folder / MADE_FROM).read_text())
    assert note["base"] == recipe.model.name and note["merged_into"] == "the 4-bit base, dequantised"


def test_a_base_in_fp32_becomes_16_bit(adapted, small_model, tmp_path):
    base = small_model("llama", initializer_range=0.05)
    wide = tmp_path / "fp32"
    shutil.copytree(base, wide)
    weights = {name: tensor.float() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(weights, wide / "model.safetensors", metadata={"format": "pt"})
    recipe = adapted("llama", base=wide)
    folder = merged(recipe, tmp_path / "merged")
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert divergence(trained_logits(recipe), logits(folder)) <= KL_BOUND


def test_a_16_bit_base_is_merged_as_it_is(adapted, tmp_path):
    recipe = adapted("llama", bits=16)
    weights = MergedWeights(find_adapter(recipe))
    assert not weights.quantised
    assert divergence(trained_logits(recipe), logits(merged(recipe, tmp_path))) <= KL_BOUND


def test_a_base_that_is_stored_in_4_bit_becomes_a_whole_model(adapted, small_model, tmp_path):
    load_4bit(adapted("llama").model, FP32).save_pretrained(tmp_path / "nf4")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(small_model("llama") / name, tmp_path / "nf4" / name)
    recipe = adapted("llama", base=tmp_path / "nf4")
    folder = merged(recipe, tmp_path / "merged")
    assert divergence(trained_logits(recipe), logits(folder)) <= KL_BOUND
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    with pytest.raises(UserError, match="is a 4-bit checkpoint: it has no original weights"):
        MergedWeights(find_adapter(recipe), original=True)


@pytest.mark.parametrize(
    "form",
    [
        MIXED,
        NESTED | {"bnb_4bit_use_double_quant": False},
        NESTED | {"bnb_4bit_quant_storage": "int8"},
        NESTED | {"bnb_4bit_quant_storage": "bfloat16"},
    ],
    ids=["mixed", "plain scales", "packed in int8", "packed in bf16"],
)
def test_a_4_bit_checkpoint_of_any_form_becomes_what_plain_libraries_trained(adapted, four_bit, tmp_path, form):
    base = four_bit(**form)
    recipe = adapted(base=base)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for module in plain.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False  # else bitsandbytes rounds: common.model.nf4.keep_packed_form
    with torch.no_grad():
        trained = PeftModel.from_pretrained(plain, recipe.out).eval()(IDS).logits
    folder = merged(recipe, tmp_path / "merged")
    assert divergence(trained, logits(folder)) <= 3e-5  # rounding to bf16: 1.1e-5, which the check explains
    assert check_merged(find_adapter(recipe), folder).startswith("KL ")
    export_path = tmp_path / "model.gguf"
    weights = MergedWeights(find_adapter(recipe))
    GgufModel(weights, trained_tokenizer(weights.adapter), "x", "bf16").write(export_path)
    exported = {tensor.name: tensor for tensor in gguf.GGUFReader(export_path).tensors}
    ours = load_file(folder / "model.safetensors")
    for name, stored in (("ffn_up", "mlp.up_proj"), ("attn_v", "self_attn.v_proj")):
        for layer in (0, 1):  # of MIXED the one has its MLP in 16 bits, the other in 4
            tensor = exported[f"blk.{layer}.{name}.weight"]
            values = torch.from_numpy(dequantize_gguf(tensor.data, tensor.tensor_type))
            assert torch.equal(values, ours[f"model.layers.{layer}.{stored}.weight"].float())


@pytest.mark.parametrize("command", ["plan", "merge", "export", "chat"])
def test_a_base_in_fp4_is_refused_by_every_command(adapted, four_bit, tmp_path, capsys, command):
    """Also after a run: the base that it trained on is there no longer."""
    base = tmp_path / "base"
    shutil.copytree(four_bit(**NESTED), base)
    recipe = adapted(base=base)
    shutil.copytree(four_bit(), base, dirs_exist_ok=True)  # fp4 is bitsandbytes' own default
    assert run_command(command, "x", recipe, []) == 2
    assert f"{base} is quantised in fp4; take an nf4 checkpoint, or the original" in capsys.readouterr().err


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_check_goes_through_the_layers_as_the_models_do(adapted, tmp_path, architecture):
    """Layer by layer from the files, and whole in the libraries: the same divergence."""
    recipe = adapted(architecture, tie_word_embeddings=architecture == "qwen2")
    folder = merged(recipe, tmp_path, original=True)  # far enough apart to compare digits
    agreement = compare(MergedWeights(find_adapter(recipe)), folder, IDS.tolist())
    assert agreement.positions == IDS.numel()
    assert agreement.kl == pytest.approx(divergence(trained_logits(recipe), logits(folder)), rel=1e-3)


def test_a_merge_that_went_wrong_is_found_and_nothing_is_kept(adapted, tmp_path, monkeypatch, capsys):
    recipe = adapted("llama")
    right = MergedWeights.merged

    def wrong(self, name):
        return right(self, name) * (1.05 if "layers.1.mlp.up_proj" in name else 1)

    monkeypatch.setattr(MergedWeights, "merged", wrong)
    assert run_command("merge", "x", recipe, ["--to", str(tmp_path / "merged")]) == 2
    assert "the merged model is not the trained one, and nothing was kept: KL" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_merge_of_other_weights_than_the_run_loads_is_found(adapted, tmp_path, monkeypatch, capsys):
    """The disk shows an older model to whoever reads the base with Python, as the merge does, and not to the library's
    own reader, as a run does. Nothing but the check can tell."""
    recipe = adapted("llama")
    base, older, right = Path(recipe.model.name), tmp_path / "older.safetensors", Path.open
    tensors = load_file(base / "model.safetensors")
    save_file({name: tensor * 1.05 for name, tensor in tensors.items()}, older, {"format": "pt"})

    def opened(path: Path, *mode: Any, **options: Any) -> Any:
        return right(older if path == base / "model.safetensors" else path, *mode, **options)

    monkeypatch.setattr(Path, "open", opened)
    assert run_command("merge", "x", recipe, ["--to", str(tmp_path / "merged")]) == 2
    assert "the merged model is not the trained one, and nothing was kept: KL" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_a_base_that_changes_between_merge_and_check_is_found(adapted, small_model, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(small_model("llama", initializer_range=0.05), base)
    recipe = adapted("llama", base=base)
    folder = merged(recipe, tmp_path / "merged")
    check_merged(find_adapter(recipe), folder)
    changed = {name: tensor * 1.05 for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(changed, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="is not the trained one, .* Rounding does not explain it: KL"):
        check_merged(find_adapter(recipe), folder)


def test_the_tokenizer_of_the_run_is_taken_where_the_base_has_other_tokens(adapted, tmp_path):
    recipe = adapted("llama")
    saved = Path(recipe.out) / "tokenizer.json"
    saved.write_text(saved.read_text().replace("<|user|>", "<|human|>"))
    folder = merged(recipe, tmp_path / "merged")
    assert (folder / "tokenizer.json").read_bytes() == saved.read_bytes()


def test_the_template_of_the_run_is_the_only_one(adapted, small_model, tmp_path):
    """Also where base and adapter have theirs in tokenizer_config.json, as older libraries wrote it."""
    base = tmp_path / "base"
    shutil.copytree(small_model("llama"), base)
    recipe = adapted("llama", base=base)
    for folder, template in ((base, "{{ 'of the base' }}"), (Path(recipe.out), "{{ 'of the run' }}")):
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    folder = merged(recipe, tmp_path / "merged")
    assert (folder / "chat_template.jinja").read_text() == "{{ 'of the run' }}"
    assert "chat_template" not in json.loads((folder / "tokenizer_config.json").read_text())


def test_the_check_asks_what_the_run_was_asked(adapted):
    adapter = find_adapter(adapted("llama"))
    tokenizer = trained_tokenizer(adapter)
    assert len(encode_check_prompts(adapter, tokenizer)) == len(merge_check.CHECK_PROMPTS)
    told = replace(adapter, run={"samples": [{"asked": "Tea?", "after": "Yes."}]})
    (ids,) = encode_check_prompts(told, tokenizer)
    assert tokenizer.decode(ids) == "<s><|user|>Tea?<|end|><|assistant|>Yes.<|end|>"
    tokenizer.chat_template = None
    assert tokenizer.decode(encode_check_prompts(told, tokenizer)[0]) == "Tea? Yes."


def test_an_adapter_that_is_not_finite_is_refused(adapted, tmp_path):
    recipe = adapted("llama")
    path = Path(recipe.out) / "adapter_model.safetensors"
    weights = load_file(path)
    next(tensor for name, tensor in weights.items() if "lora_B" in name).fill_(float("nan"))
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="is not finite: the adapter or the base is damaged"):
        merged(recipe, tmp_path)


def test_a_dry_run_has_no_base_to_merge_into(adapted):
    recipe = adapted("llama")
    with pytest.raises(UserError, match="had random weights, a dry run"):
        MergedWeights(find_adapter(replace(recipe, model=replace(recipe.model, weights="random"))))


def test_merging_takes_the_place_that_it_is_given_and_says_its_peak(adapted, tmp_path, capsys):
    recipe = adapted("llama")
    target = tmp_path / "disk" / "merged"
    assert run_command("merge", "x", recipe, ["--to", str(target)]) == 0
    out = capsys.readouterr().out
    assert "merging into the 4-bit base, dequantised" in out
    assert out.startswith(f"reading the adapter in {recipe.out}\n")  # before the imports, which take seconds
    assert "self-check: the trained and the merged model read a few prompts" in out
    assert "self-check: KL" in out and "peak of host memory" in out
    assert run_command("merge", "x", recipe, ["--to", str(target)]) == 2
    assert "merged exists. Replace it: ARGS=--overwrite" in capsys.readouterr().err
    assert run_command("merge", "x", recipe, ["--to", str(target), "--overwrite", "--base", "original"]) == 0
    assert json.loads((target / MADE_FROM).read_text())["merged_into"] == "the original weights"
    assert sorted(path.name for path in target.parent.iterdir()) == ["merged"]


def test_only_folders_from_here_are_replaced(adapted, tmp_path, capsys):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    flags = ["--to", str(tmp_path / "thesis"), "--overwrite"]
    assert run_command("merge", "x", adapted("llama"), flags) == 2
    assert "was not made by this command" in capsys.readouterr().err
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "years of work"


def test_the_check_stops_at_its_bound(adapted, tmp_path):
    recipe = adapted("llama")
    folder = merged(recipe, tmp_path, original=True)
    with pytest.raises(UserError, match="is not the trained one, .* Rounding does not explain it: KL"):
        check_merged(find_adapter(recipe), folder)
    assert check_merged(find_adapter(recipe), folder, bound=None).startswith("KL ")


@pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS)
def test_what_rounding_alone_makes_is_said_and_kept(adapted, tmp_path, lora):
    """Some models feel the rounding of their weights more than others: 2e-5 in 32 layers of noise at 8B."""
    recipe = adapted("llama", lora)
    folder = merged(recipe, tmp_path)
    said = check_merged(find_adapter(recipe), folder, bound=1e-12)
    assert "and all of it is rounding: the files hold the trained weights rounded to 16 bits (KL" in said
