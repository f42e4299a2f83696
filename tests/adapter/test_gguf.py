"""GGUF files, read back with the gguf package and run by llama.cpp (xllamacpp)."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import xllamacpp
from gguf.quants import dequantize
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from common.adapter.find import find_adapter
from common.adapter.gguf import GgufModel, gguf_names, permute_heads, write_adapter
from common.adapter.gguf_tokenizer import read_vocabulary, strip_generation_marks
from common.adapter.load import trained_tokenizer
from common.adapter.merge import MergedWeights, write_merged
from common.adapter.tokenizer_json import SPLITS
from common.cli import run_command
from common.data.report import DataReport
from common.data.tokenise import read_examples
from common.model.chat_template import fix_date
from common.recipe import LoraSpec, ModelSpec, Recipe, UserError
from common.run.generation import generate
from common.run.prompts import load_prompts
from recipes.tiny import RECIPE
from tests.conftest import ARCHITECTURES, ROOT, TRAIN

HELD_OUT = "data/tiny/held_out.jsonl"
QUANTS = ("f16", "bf16", "q8_0")
ROUNDING = 0.05  # nats: that of f16 weights and activations here, beside bf16 weights; seen: 0.015 to 0.03


class LlamaCpp:
    """llama.cpp with a model, answering greedily."""

    def __init__(self, path: Path, lora: Path | None = None) -> None:
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(path)
        parameters.n_ctx, parameters.n_parallel, parameters.warmup, parameters.verbosity = 1024, 1, False, -1
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
        parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        if lora:
            adapter = xllamacpp.CommonAdapterLoraInfo()
            adapter.path, adapter.scale = str(lora), 1.0
            parameters.lora_adapters = [adapter]
        self.server = xllamacpp.Server(parameters)

    def next_tokens(self, prompt: list[int]) -> dict[int, float]:
        """Log-probabilities of the twenty most likely next tokens; none where the first is half a character."""
        request = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 20, "cache_prompt": False}
        told = self.server.handle_completions(request)["choices"][0]["logprobs"]
        return {token["id"]: token["logprob"] for token in told["content"][0]["top_logprobs"]} if told else {}

    def go_on(self, prompt: str | list[int], tokens: int, **arguments: Any) -> tuple[str, int]:
        """The most likely text after a prompt, and how many tokens the prompt has for llama.cpp."""
        request = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "cache_prompt": False, **arguments}
        answer = self.server.handle_completions(request)
        return answer["choices"][0]["text"], answer["usage"]["prompt_tokens"]

    def chat(self, messages: list[dict[str, str]], tokens: int) -> str:
        answer = self.server.handle_chat_completions({"messages": messages, "max_tokens": tokens, "temperature": 0})
        return answer["choices"][0]["message"]["content"]


def export(recipe: Recipe, path: Path, quant: str = "bf16", *, original: bool = False) -> Path:
    weights = MergedWeights(find_adapter(recipe), original=original)
    GgufModel(weights, trained_tokenizer(weights.adapter), "x", quant).write(path)
    return path


def merged_model(recipe: Recipe, folder: Path, *, original: bool = False) -> Any:
    """The merged model in plain transformers, fp32."""
    folder.mkdir()
    write_merged(MergedWeights(find_adapter(recipe), original=original), folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def furthest(runtime: LlamaCpp, model: Any, prompts: list[list[int]]) -> float:
    """Largest difference of a likely next token's log-probability between llama.cpp and transformers."""
    with torch.no_grad():
        expected = model(torch.tensor(prompts)).logits[:, -1].log_softmax(-1)
    errors = [
        abs(ours - theirs[token].item())
        for prompt, theirs in zip(prompts, expected, strict=True)
        for token, ours in runtime.next_tokens(prompt).items()
    ]
    assert len(errors) >= 20 * len(prompts) // 2
    return max(errors)


def noise(prompts: int, tokens: int) -> list[list[int]]:
    return torch.randint(10, 900, (prompts, tokens), generator=torch.Generator().manual_seed(0)).tolist()


def for_llama_cpp(architecture: str) -> dict[str, object]:
    """llama.cpp scales a small Gemma's queries by their dimension, 16, and by nothing else."""
    return {"query_pre_attn_scalar": 16} if architecture == "gemma3_text" else {}


@pytest.fixture(scope="module")
def tiny(finetuned) -> Recipe:
    return replace(RECIPE, out=str(finetuned[1]))


@pytest.fixture(scope="module")
def asked(tiny, tmp_path_factory) -> tuple[list[list[dict[str, str]]], list[list[int]], list[str]]:
    """Sixty held-out conversations up to the answer, their token ids, and the answers of transformers."""
    tokenizer = trained_tokenizer(find_adapter(tiny))
    examples = [chat for _, chat in read_examples(HELD_OUT, DataReport(HELD_OUT))][:60]
    prompts = load_prompts(HELD_OUT, tokenizer, limit=60)
    model = merged_model(tiny, tmp_path_factory.mktemp("merged") / "model")
    messages = [[{"role": m.role, "content": m.content} for m in chat.messages[:-1]] for chat in examples]
    return messages, [prompt.input_ids for prompt in prompts], generate(model, tokenizer, prompts)


@pytest.mark.parametrize("quant", QUANTS)
def test_llama_cpp_answers_as_transformers_does(tiny, asked, tmp_path, quant):
    """Sixty prompts, greedy, to the letter; as token ids, and as messages through llama.cpp's own template engine."""
    messages, prompts, answers = asked
    runtime = LlamaCpp(export(tiny, tmp_path / "tiny.gguf", quant))
    assert [runtime.go_on(prompt, 96)[0] for prompt in prompts] == answers
    assert [runtime.chat(chat, 96) for chat in messages] == answers


@pytest.mark.parametrize(("quant", "share"), [("q6_k", 0.95), ("q5_k_m", 0.9), ("q4_k_m", 0.9)])
def test_small_formats_give_most_of_the_answers(tiny, asked, tmp_path, quant, share):
    """Of sixty, to the letter. Most of the tiny model's rows, of 192, have no k-quants but their stand-ins."""
    _, prompts, answers = asked
    runtime = LlamaCpp(export(tiny, tmp_path / "tiny.gguf", quant))
    given = [runtime.go_on(prompt, 96)[0] for prompt in prompts]
    assert sum(one == other for one, other in zip(given, answers, strict=True)) >= share * len(answers)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "lora", [LoraSpec(rank=4, alpha=8), LoraSpec(rank=4, alpha=8, dora=True)], ids=["lora", "dora"]
)
def test_every_architecture_runs(adapted, tmp_path, architecture, lora):
    """Weights of noise, so that every digit counts: log-probabilities after fifty prompts."""
    recipe = adapted(architecture, lora, initializer_range=0.1, vocab_size=1088, **for_llama_cpp(architecture))
    runtime = LlamaCpp(export(recipe, tmp_path / "x.gguf", "f16"))
    error = furthest(runtime, merged_model(recipe, tmp_path / "merged"), noise(50, 24))
    print(error)
    assert error <= ROUNDING


def test_every_tensor_is_that_of_the_merged_model(adapted, tmp_path):
    recipe = adapted("qwen2", vocab_size=1088)
    weights = MergedWeights(find_adapter(recipe))
    for quant, kind in (("bf16", "BF16"), ("f16", "F16"), ("q8_0", "Q8_0")):
        reader = gguf.GGUFReader(export(recipe, tmp_path / f"{quant}.gguf", quant))
        stored = {tensor.name: tensor for tensor in reader.tensors}
        names = {n: gguf_names(weights.config).get_name(n, (".weight", ".bias")) for n in weights.stored.entries}
        assert set(stored) == set(names.values()) and "blk.0.attn_q.bias" in stored
        for name, place in names.items():
            wanted = weights.merged(name).float().numpy()
            assert stored[place].tensor_type.name == (kind if wanted.ndim > 1 else "F32")
            given = dequantize(stored[place].data, stored[place].tensor_type).reshape(wanted.shape)
            scale = np.abs(wanted).max()
            assert np.abs(given - wanted).max() <= {"bf16": 1 / 256, "f16": 1 / 2048, "q8_0": 1 / 200}[quant] * scale


def test_rows_of_queries_and_keys_are_laid_as_llama_cpp_rotates(adapted):
    config = MergedWeights(find_adapter(adapted("llama"))).config  # 4 heads of 16, 2 for keys
    rows = torch.arange(64)[:, None].expand(64, 3)
    moved = permute_heads(rows, "model.layers.0.self_attn.q_proj.weight", config)[:, 0].tolist()
    assert moved[:4] == [0, 8, 1, 9] and moved[16:18] == [16, 24]
    assert torch.equal(permute_heads(rows, "model.layers.0.mlp.up_proj.weight", config), rows)
    qwen = MergedWeights(find_adapter(adapted("qwen3"))).config
    assert torch.equal(permute_heads(rows, "model.layers.0.self_attn.q_proj.weight", qwen), rows)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("rslora", [False, True])
def test_the_adapter_alone_goes_onto_a_gguf_of_the_base(adapted, tokenizer, tmp_path, architecture, rslora):
    """llama.cpp with base and adapter apart, beside transformers with the two merged."""
    lora = LoraSpec(rank=4, alpha=8, rslora=rslora)
    recipe = adapted(architecture, lora, initializer_range=0.1, **for_llama_cpp(architecture))
    model = merged_model(recipe, tmp_path / "merged", original=True)
    write_adapter(find_adapter(recipe), model.config, tmp_path / "lora.gguf", "x")
    base = export(weightless(recipe, tmp_path / "base"), tmp_path / "base.gguf", "f16", original=True)
    assert furthest(LlamaCpp(base), model, noise(5, 24)) > 10 * ROUNDING
    error = furthest(LlamaCpp(base, tmp_path / "lora.gguf"), model, noise(20, 24))
    print(error)
    assert error <= ROUNDING


def weightless(recipe: Recipe, folder: Path) -> Recipe:
    """The same recipe with an adapter that does nothing."""
    from safetensors.torch import save_file

    shutil.copytree(recipe.out, folder)
    path = folder / "adapter_model.safetensors"
    save_file(
        {n: t.zero_() if "lora_B" in n else t for n, t in load_file(path).items()}, path, metadata={"format": "pt"}
    )
    return replace(recipe, out=str(folder))


# Tokenizers as those of the real models: text cut by the same rules, trained here on the shipped conversations.
CORPUS = [*Path(ROOT / TRAIN).read_text().splitlines()[:400], *(str(n) for n in range(0, 3000, 7)), "déjà vu … 東京 🎉"]
TEXTS = (
    "Hello there, it's 12345 o'clock!",
    "  two spaces, a tab\tand\n\nlines\n",
    "don't SHOUT, I'LL go; naïve café 東京 🎉 x²",
    "def f(x):\n    return x**2  # 1,234.5",
    "ends with a space ",
)
TEMPLATE = "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"
SPECIAL = ["<s>", "<|end|>", "<|user|>", "<|assistant|>", "<pad>"]


def byte_level(pre_tokenizer: Any, normalizer: Any = None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return finished(tokenizer)


def cut(rule: str, normalizer: Any = None) -> PreTrainedTokenizerFast:
    from tokenizers import Regex

    pattern = next(pattern for pattern, name in SPLITS.items() if name == rule)
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return byte_level(pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)]), normalizer)


def whole_words() -> PreTrainedTokenizerFast:
    """As Llama 3's: a word that is a token stays whole, whatever the merges make of it. "Hello" has no merges."""
    tokenizer = cut("llama-bpe")
    values = json.loads(tokenizer.backend_tokenizer.to_str())
    values["model"]["ignore_merges"] = True
    assert values["model"]["vocab"].setdefault("Hello", 1000) == 1000
    return finished(Tokenizer.from_str(json.dumps(values)))


def sentencepiece(scheme: str) -> PreTrainedTokenizerFast:
    """As transformers makes one of Mistral's tokenizer.model: every pair of pieces that makes a piece is a merge."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    trainer = trainers.BpeTrainer(vocab_size=500, show_progress=False)
    trained.train_from_iterator(CORPUS, trainer)
    pieces = sorted(trained.get_vocab(), key=trained.get_vocab().get)
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(["<unk>", *SPECIAL, *bytes_, *pieces]))}
    rank = {piece: index for index, piece in enumerate(pieces)}
    merges = sorted(
        (
            (a, b)
            for piece in pieces
            for i in range(1, len(piece))
            for a, b in [(piece[:i], piece[i:])]
            if {a, b} <= set(rank)
        ),
        key=lambda pair: (rank["".join(pair)], len(pair[0])),
    )
    model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    if scheme == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.add_special_tokens(["<unk>", *SPECIAL])
    return finished(tokenizer)


def finished(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|end|>", pad_token="<pad>", chat_template=TEMPLATE
    )


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "gpt-2": lambda: byte_level(pre_tokenizers.ByteLevel(False)),
    "smollm": lambda: byte_level(
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)])
    ),
    "llama-bpe": lambda: cut("llama-bpe"),
    "llama-bpe, words whole": whole_words,
    "qwen2": lambda: cut("qwen2", normalizers.NFC()),
    "sentencepiece, as a normalizer": lambda: sentencepiece("normalizer"),
    "sentencepiece, first": lambda: sentencepiece("first"),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_llama_cpp_cuts_text_into_the_same_tokens(adapted, small_model, tmp_path, kind):
    """A chat prompt as text gives as many tokens, and the same next ones, as transformers' ids give."""
    base = tmp_path / "base"
    shutil.copytree(small_model("llama", initializer_range=0.1), base)
    tokenizer = TOKENIZERS[kind]()
    for old in base.glob("*token*"):
        old.unlink()
    tokenizer.save_pretrained(base)
    recipe = adapted("llama", base=base)
    runtime = LlamaCpp(export(recipe, tmp_path / "x.gguf"))
    assert read_vocabulary(trained_tokenizer(find_adapter(recipe)), 1024).tokens[-1] == "[PAD1023]"
    for text in TEXTS:
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False)
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        of_text = runtime.go_on(prompt.removeprefix("<s>"), 6, ignore_eos=True)
        of_ids = runtime.go_on(ids, 6, ignore_eos=True)
        assert of_text == of_ids, text


DATED = TEMPLATE.replace("{{ bos_token }}", "{{ bos_token }}It is {{ strftime_now('%d %b %Y') }}.")
TEMPLATE_FILES = ROOT / "models" / "chat_templates"
CHAT_TEMPLATES = {
    "mistral_v3": (TEMPLATE_FILES / "mistral_v3.jinja").read_text(),
    "mistral_tekken": (TEMPLATE_FILES / "mistral_tekken.jinja").read_text(),
    "of one date": fix_date(DATED, date(2026, 11, 27)),
}


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_llama_cpp_renders_our_templates_as_transformers_does(adapted, small_model, tmp_path, name):
    base = tmp_path / "base"
    shutil.copytree(small_model("llama", initializer_range=0.1), base)
    tokenizer = TOKENIZERS["llama-bpe"]()
    tokenizer.chat_template = CHAT_TEMPLATES[name]
    for old in (*base.glob("*token*"), *base.glob("*.jinja")):
        old.unlink()
    tokenizer.save_pretrained(base)
    runtime = LlamaCpp(export(adapted("llama", base=base), tmp_path / "x.gguf"))
    turns = [{"role": role, "content": f"{role} says 1"} for role in ("system", "user", "assistant", "user")]
    for messages in (turns[1:2], turns[:2], turns[1:], turns):
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        request = {"messages": messages, "max_tokens": 6, "temperature": 0, "cache_prompt": False}
        answer = runtime.server.handle_chat_completions(request)
        assert answer["usage"]["prompt_tokens"] == len(ids)
        assert runtime.go_on(ids, 6)[0] == answer["choices"][0]["message"]["content"]


def test_marks_of_what_is_trained_leave_the_template(tokenizer):
    plain = strip_generation_marks(tokenizer.chat_template)
    assert "generation -%}" not in plain and "add_generation_prompt" in plain
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " Hello\n"}]
    before = tokenizer.apply_chat_template(chat, tokenize=False)
    assert tokenizer.apply_chat_template(chat, tokenize=False, chat_template=plain) == before


def test_rope_scaling_is_written_or_refused(adapted, tmp_path):
    kinds = {
        "llama3": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "linear": {"factor": 2.0},
        "yarn": {"factor": 2.0, "original_max_position_embeddings": 64},
    }
    for kind, values in kinds.items():
        rope = {"rope_type": kind, "rope_theta": 10000.0, **values}
        recipe = adapted("llama", initializer_range=0.1, rope_parameters=rope)
        runtime = LlamaCpp(export(recipe, tmp_path / f"{kind}.gguf", "f16"))
        error = furthest(runtime, merged_model(recipe, tmp_path / kind), noise(10, 100))
        print(kind, error)
        assert error <= ROUNDING
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
    for architecture, rope, message in (
        (
            "llama",
            {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
            "a model with dynamic RoPE cannot be exp",
        ),
        # llama.cpp reads the factors of Llama 3.1 for no other architecture
        ("qwen2", {"rope_type": "llama3", "rope_theta": 1e4, **kinds["llama3"]}, "with llama3 RoPE .* none for qwen2"),
        ("qwen3", {"rope_type": "llama3", "rope_theta": 1e4, **kinds["llama3"]}, "with llama3 RoPE .* none for qwen3"),
        (
            "llama",
            yarn | {"attention_factor": 1.5},
            "YaRN RoPE with attention_factor 1.5 cannot be exported .* 1.06931",
        ),
        (
            "qwen3",
            yarn | {"mscale": 1.0, "mscale_all_dim": 1.0},
            "YaRN RoPE with attention_factor 1 cannot be exported",
        ),
        ("llama", yarn | {"beta_fast": 16.0}, "YaRN RoPE with beta_fast 16 cannot be exported to GGUF, .* takes 32"),
        ("qwen2", yarn | {"beta_slow": 2.0}, "YaRN RoPE with beta_slow 2 cannot be exported"),
        ("mistral", yarn | {"truncate": False}, "YaRN RoPE with truncate 0 cannot be exported"),
    ):
        with pytest.raises(UserError, match=message):
            export(adapted(architecture, vocab_size=1088, rope_parameters=rope), tmp_path / "x.gguf")


def with_scaling(recipe: Recipe, **scaling: object) -> Recipe:
    return replace(recipe, model=replace(recipe.model, rope_scaling=scaling))


@pytest.mark.parametrize(
    ("architecture", "scaling"),
    [
        ("llama", {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
        ("mistral", {"rope_type": "yarn"}),
        ("qwen2", {"rope_type": "linear"}),
        ("qwen3", {"rope_type": "yarn"}),
        ("gemma3_text", {"rope_type": "linear"}),
    ],
    ids=lambda value: value if isinstance(value, str) else value["rope_type"],
)
def test_a_recipes_rope_scaling_reaches_llama_cpp_and_plain_transformers(adapted, tmp_path, architecture, scaling):
    """Prompts of 150 tokens; the base has 40 positions. Without the scaling the two are further apart than rounding."""
    values = {"max_position_embeddings": 40, "initializer_range": 0.1, **for_llama_cpp(architecture)}
    plain = adapted(architecture, vocab_size=1088, **values)
    original = {} if scaling["rope_type"] == "linear" else {"original_max_position_embeddings": 40}
    recipe = with_scaling(plain, factor=6.0, **scaling, **original)
    merged, prompts = merged_model(recipe, tmp_path / "merged"), noise(8, 150)
    assert merged.config.max_position_embeddings == 240
    path = export(recipe, tmp_path / "x.gguf", "f16")
    arch = gguf.GGUFReader(path).fields["general.architecture"].contents()
    assert gguf.GGUFReader(path).fields[f"{arch}.context_length"].contents() == 240
    runtime = LlamaCpp(path)
    assert furthest(runtime, merged, prompts) <= ROUNDING
    assert furthest(runtime, merged_model(plain, tmp_path / "plain"), prompts) > ROUNDING
    with pytest.raises(UserError, match="trained with ModelSpec.rope_scaling cannot be exported alone"):
        write_adapter(find_adapter(recipe), MergedWeights(find_adapter(recipe)).config, tmp_path / "lora.gguf", "x")


# Gemma's own pattern is no word of the file, another one is. The larger ones scale the RoPE of layers without a window.
GEMMAS = {
    "as the 1B": {"num_hidden_layers": 7, "sliding_window_pattern": 6},
    "another pattern": {"layer_types": ["full_attention", "sliding_attention"]},
    "as the 4B": {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    },
}


@pytest.mark.parametrize("kind", GEMMAS)
def test_windows_and_ropes_of_a_gemma_are_those_of_its_layers(adapted, tmp_path, kind):
    """Prompts are longer than the window, of 8 tokens."""
    recipe = adapted("gemma3_text", initializer_range=0.1, query_pre_attn_scalar=16, **GEMMAS[kind])
    path = export(recipe, tmp_path / "x.gguf", "f16")
    told = "gemma3.attention.sliding_window_pattern" in gguf.GGUFReader(path).fields
    assert told == (kind != "as the 1B")
    error = furthest(LlamaCpp(path), merged_model(recipe, tmp_path / "merged"), noise(10, 60))
    print(kind, error)
    assert error <= ROUNDING


def test_a_gemma_that_llama_cpp_cannot_run_is_refused(adapted, tmp_path):
    rope = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")}
    yarn = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 2.0, "original_max_position_embeddings": 64}
    linear = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    for values, message in (
        ({}, "query_pre_attn_scalar 32 cannot be exported to GGUF, llama.cpp takes 16"),
        ({"layer_types": ["full_attention"] * 2}, "without a layer of sliding attention cannot be exported"),
        ({"rope_parameters": rope | {"full_attention": yarn}}, "a model with yarn RoPE cannot be exported"),
        ({"rope_parameters": rope | {"sliding_attention": yarn}}, "with yarn RoPE on its layers of sliding attention"),
        (
            {"rope_parameters": rope | {"sliding_attention": linear}},
            "with linear RoPE on its layers of sliding attention",
        ),
    ):
        with pytest.raises(UserError, match=message):
            export(adapted("gemma3_text", **({"query_pre_attn_scalar": 16} if values else {}) | values), tmp_path / "x")


def test_an_adapter_that_is_not_plain_lora_is_not_exported_alone(adapted, tmp_path, capsys):
    recipe = adapted("llama", LoraSpec(rank=4, alpha=8, dora=True))
    assert run_command("export", "x", recipe, ["--format", "lora", "--to", str(tmp_path / "x.gguf")]) == 2
    assert "a DoRA adapter cannot be exported alone" in capsys.readouterr().err
    plain = find_adapter(adapted("llama"))
    config = MergedWeights(plain).config
    plain.config.rank_pattern = {"q_proj": 8}
    with pytest.raises(UserError, match="with ranks of its own for some layers"):
        write_adapter(plain, config, tmp_path / "x.gguf", "x")
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_where_it_says(adapted, tmp_path, capsys):
    recipe = adapted("llama")
    assert run_command("export", "x", recipe, ["--quant", "f16"]) == 0
    name = Path(recipe.out).name
    target = Path(f"{recipe.out}-gguf") / f"{name}-f16.gguf"
    assert f"the merged model is in {target}; peak of host memory" in capsys.readouterr().out
    assert run_command("export", "x", recipe, ["--quant", "f16"]) == 2
    assert "exists. Replace it: ARGS=--overwrite" in capsys.readouterr().err
    assert run_command("export", "x", recipe, ["--quant", "f16", "--overwrite"]) == 0
    assert run_command("export", "x", recipe, ["--format", "lora"]) == 0
    assert sorted(path.name for path in target.parent.iterdir()) == [f"{name}-f16.gguf", f"{name}-lora.gguf"]
    for flags, message in (
        (["--format", "onnx"], "FORMAT is 'onnx'; choose one of gguf, lora, ollama"),
        (["--quant", "q3_k"], "QUANT is 'q3_k'; choose one of f16, bf16, q8_0, q6_k, q5_k_m, q4_k_m"),
        (["--base", "8bit"], "BASE is '8bit'; choose one of 4bit, original"),
    ):
        assert run_command("export", "x", recipe, flags) == 2
        assert message in capsys.readouterr().err


def test_the_announced_size_is_the_size(adapted, tmp_path):
    """The disk is asked for it before anything is written; vocabulary and padding come on top."""
    recipe = adapted("qwen3")
    for quant in QUANTS:
        weights = MergedWeights(find_adapter(recipe))
        model = GgufModel(weights, trained_tokenizer(weights.adapter), "x", quant)
        model.write(tmp_path / quant)
        assert 0 <= (tmp_path / quant).stat().st_size - model.size < 60_000


def test_general_facts_are_in_the_file(tiny, tmp_path):
    reader = gguf.GGUFReader(export(tiny, tmp_path / "x.gguf", "q8_0"))
    facts = {name: field.contents() for name, field in reader.fields.items()}
    config = json.loads((ROOT / "models" / "tiny" / "config.json").read_text())
    assert facts["general.architecture"] == "llama"
    assert facts["llama.block_count"] == config["num_hidden_layers"]
    assert facts["llama.attention.head_count_kv"] == config["num_key_value_heads"]
    assert facts["llama.context_length"] == config["max_position_embeddings"]
    assert facts["tokenizer.ggml.pre"] == "smollm"
    assert facts["tokenizer.ggml.eos_token_id"] == 2 and facts["tokenizer.ggml.add_bos_token"] is True
    assert len(facts["tokenizer.ggml.tokens"]) == config["vocab_size"]
    assert ModelSpec(RECIPE.model.name).name not in facts["general.name"]  # a name, not a path
