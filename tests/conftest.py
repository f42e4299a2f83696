"""Small models of each architecture, saved as ordinary checkpoints, and the shipped tokenizer."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from functools import cache
from pathlib import Path

from tests import tiers

os.environ.update(tiers.environment())
# Several test processes share the cores. A thread of OpenMP that waits for another one spins on its core by default.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"  # as quiet_libraries does, which here comes after the imports

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import chat_template_utils

from common.machine.device import Machine
from common.model import file_hash
from common.model.loading import load_4bit, load_tokenizer
from common.model.lora import attach_lora
from common.process_state import quiet_libraries
from common.recipe import DataSpec, LoraSpec, ModelSpec, Recipe, TrainSpec
from common.run.artefacts import save_trained
from tests import real_tokenizers, real_weights

ROOT = Path(__file__).parent.parent
TINY = ROOT / "models" / "tiny"
TRAIN = str(ROOT / "data" / "tiny" / "train.jsonl")
ARCHITECTURES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "gemma3_text": (Gemma3TextConfig, Gemma3ForCausalLM),
}
# What an architecture has beside SMALL. Gemma: a window that rows exceed, with a full layer after each that has it, and
# a scaling that is not 1 / sqrt(dim).
SMALL_BESIDES: dict[str, dict[str, object]] = {
    "gemma3_text": {
        "tie_word_embeddings": True,
        "sliding_window": 8,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 32,
    },
}
SMALL = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FP32 = Machine(torch.device("cpu"), torch.float32, "tests compare digits", "CPU")


DEFAULT_TIER = "not slow and not gpu"  # of pyproject.toml


def pytest_configure(config: pytest.Config) -> None:
    """Refuses the GPU tier where it was asked for in a way that tests/tiers.py could not see."""
    if tiers.is_gpu_tier(config.option.markexpr) and tiers.gpus_are_hidden():
        raise pytest.UsageError("the GPU is hidden already: write -m gpu as words of their own on the command line")


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, which make test uses
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One worker a core. GPU tests share a card and run one by one; so does whatever else is asked for."""
    cores = len(os.sched_getaffinity(0))
    return min(cores, 4) if config.option.markexpr in (DEFAULT_TIER, "slow") and cores > 1 else 0


def pytest_sessionstart(session: pytest.Session) -> None:
    """Says which tests these are, and how long all of them take. pytest -q hides what pytest_report_header returns."""
    tiers = {
        DEFAULT_TIER: "the fast tests, all of them about 15 minutes on two cores\n"
        "the others: make test ARGS='-m slow', about 40 minutes; make test ARGS='-m gpu' on a machine with a GPU",
        "slow": "the slow tests, all of them about 40 minutes on two cores",
        "gpu": "the tests that need an NVIDIA GPU, about 10 minutes; without one they are skipped",
    }
    expression = session.config.option.markexpr
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter and "PYTEST_XDIST_WORKER" not in os.environ:
        reporter.write_line(tiers.get(expression, f"the tests that are marked {expression or 'in any way'}"))


@pytest.fixture(scope="session", autouse=True)
def notes_of_hashes(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The sha256 of the models that tests make are remembered outside the repository."""
    file_hash.NOTES = tmp_path_factory.mktemp("sha256")


quiet_libraries()
# More threads than quiet cores make torch ten times slower, and sums in another order.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="session")
def real_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """real_tokenizer(name, chat_template=...): a tokenizer that people fine-tune with; see tests/real_tokenizers.py."""
    return real_tokenizers.real_tokenizer


@pytest.fixture(scope="session")
def real_model() -> Path:
    """The folder of SmolLM2-135M-Instruct in 16 bits, shared by all tests: see tests/real_weights.py."""
    return real_weights.real_weights()


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Callable[..., Path]:
    """small_model(architecture, max_shard_size=..., **config values): the folder of a checkpoint, random weights."""

    def make(architecture: str = "llama", max_shard_size: str = "5GB", **values: object) -> Path:
        folder = tmp_path_factory.mktemp(architecture)
        config_class, model_class = ARCHITECTURES[architecture]
        torch.manual_seed(0)
        values = SMALL | {"initializer_range": 0.1} | SMALL_BESIDES.get(architecture, {}) | values
        model = model_class(config_class(**values)).to(torch.bfloat16)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def small_llama(small_model: Callable[..., Path]) -> Path:
    return small_model("llama")


# Settings of bitsandbytes' 4-bit checkpoints. MIXED: as the "dynamic" ones on the hub, with some layers in 16 bits.
NESTED = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
MIXED = NESTED | {"llm_int8_skip_modules": ("lm_head", "model.layers.0.mlp", "model.layers.2.self_attn.q_proj")}


@pytest.fixture(scope="session")
def four_bit(tmp_path_factory) -> Callable[..., Path]:
    """four_bit(dtype=..., **settings): the folder of models/tiny as transformers saves it in 4 bits; each made once.

    dtype: of what is not 4-bit.
    """

    @cache
    def make(dtype: torch.dtype = torch.float32, **settings: object) -> Path:
        folder = tmp_path_factory.mktemp("four_bit")
        shutil.copytree(TINY, folder, dirs_exist_ok=True)
        if isinstance(skipped := settings.get("llm_int8_skip_modules"), tuple):
            settings["llm_int8_skip_modules"] = list(skipped)
        config = BitsAndBytesConfig(load_in_4bit=True, **settings)
        AutoModelForCausalLM.from_pretrained(
            TINY, dtype=dtype, quantization_config=config, device_map={"": "cpu"}
        ).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def adapted(small_model, tmp_path_factory) -> Callable[..., Recipe]:
    """adapted(architecture, lora, bits=..., base=..., **config values): a recipe with an adapter of noise in `out`."""

    def make(
        architecture: str = "llama",
        lora: LoraSpec = LoraSpec(rank=4, alpha=8),  # noqa: B008 - it is frozen
        bits: int = 4,
        base: Path | None = None,
        **values: object,
    ) -> Recipe:
        # 0.05: closer to a trained model's weights than what other tests take to make logits large
        folder = base or small_model(architecture, **{"initializer_range": 0.05} | values)
        spec = ModelSpec(str(folder), bits=bits)
        model = attach_lora(load_4bit(spec, FP32), lora)
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.05)
            if "magnitude" in name:
                parameter.data.mul_(1.1)
        out = tmp_path_factory.mktemp("adapter")
        save_trained(model, load_tokenizer(spec), out)
        train = TrainSpec(seq_len=128, rows_per_step=4, learning_rate=5e-3)
        return Recipe(spec, DataSpec(TRAIN, drift_source=None), lora, train, card_gib=None, out=str(out))

    return make


def write_chats(folder: Path) -> str:
    """The path of a file with 200 conversations."""
    path = folder / "chats.jsonl"
    path.write_text("\n".join(Path(TRAIN).read_text().splitlines()[:200]) + "\n")
    return str(path)


def small_recipe(model: Path, folder: Path) -> Recipe:
    """Three steps of a small model; data and output are in the folder. No drift is measured: it takes a second."""
    return Recipe(
        model=ModelSpec(str(model)),
        data=DataSpec(write_chats(folder), eval_rows=20, drift_source=None),
        lora=LoraSpec(rank=4, alpha=8),
        train=TrainSpec(seq_len=128, rows_per_step=4, learning_rate=5e-3, max_steps=3),
        card_gib=None,
        out=str(folder / "run"),
    )


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[datetime], None]:
    """clock(moment): sets the clock of date.today, of time.time and of chat templates. It stands still."""

    def set_clock(moment: datetime) -> None:
        class Clock(datetime):
            @classmethod
            def now(cls, tz=None):
                return moment

        monkeypatch.setattr(time, "time", moment.timestamp)
        monkeypatch.setattr(chat_template_utils, "datetime", Clock)

    return set_clock


@pytest.fixture
def chats(tmp_path) -> str:
    return write_chats(tmp_path)


@pytest.fixture
def recipe(small_llama, tmp_path) -> Recipe:
    return small_recipe(small_llama, tmp_path)


@pytest.fixture(scope="session")
def finetuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, float]:
    """What `make finetune` prints, its output folder, and its seconds with start-up. All workers share one run."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # each worker has a folder of its own in it
    out, told = shared / "finetuned" / "run", shared / "finetuned.json"
    with (shared / "finetuned.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not told.exists():
            started = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-m", "recipes", "tiny", "--out", str(out)], capture_output=True, text=True, cwd=ROOT
            )
            assert done.returncode == 0, done.stderr
            told.write_text(json.dumps([done.stdout, time.perf_counter() - started]))
    printed, seconds = json.loads(told.read_text())
    return printed, out, seconds
