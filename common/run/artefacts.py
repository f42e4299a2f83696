"""The model files that a run leaves in its folder: adapter, tokenizer with chat template, generation config."""

from pathlib import Path

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from common.data.stop_ids import stop_ids
from common.machine.disk import remove, replace_atomically
from common.run.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, SAVING


def save_trained(
    model: PeftModel, tokenizer: PreTrainedTokenizerFast, folder: Path, adapter: dict[str, Tensor] | None = None
) -> None:
    """Writes the adapter, the tokenizer with its template, and a generation config that stops at the turn's end."""
    save_adapter(model, folder, adapter)
    tokenizer.save_pretrained(folder)
    generation = model.generation_config
    generation.eos_token_id = stop_ids(tokenizer, generation.eos_token_id)
    generation.pad_token_id = tokenizer.pad_token_id
    generation.save_pretrained(folder)


def save_adapter(model: PeftModel, folder: str | Path, adapter: dict[str, Tensor] | None = None) -> None:
    """Writes adapter_model.safetensors and adapter_config.json, each whole or not at all.

    adapter: the full tensors of sharded layers (gather_adapter). PEFT would also ask the hub whether the vocabulary has
    grown, and leave a README, which is a form to be filled in: neither happens.
    """
    folder = Path(folder)
    aside = folder / SAVING
    folder.mkdir(parents=True, exist_ok=True)
    remove(aside)
    model.save_pretrained(str(aside), state_dict=adapter, save_embedding_layers=False)
    for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
        replace_atomically(aside / name, folder / name)
    remove(aside)
