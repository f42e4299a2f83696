"""The model files that a run leaves in its folder: adapter, tokenizer with chat template, generation config."""

from collections.abc import Callable, Sequence
from pathlib import Path

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from common.machine.disk import remove, replace_atomically
from common.run.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, SAVING
from common.tokens.stop_ids import stop_ids


def save_trained(
    model: PeftModel, tokenizer: PreTrainedTokenizerFast, folder: Path, adapter: dict[str, Tensor] | None = None
) -> None:
    """Writes the adapter, the tokenizer with its template, and a generation config that stops at the turn's end."""
    save_adapter(model, folder, adapter)
    save_tokenizer(tokenizer, folder)
    save_generation_config(model, tokenizer, folder)


def save_adapter(model: PeftModel, folder: str | Path, adapter: dict[str, Tensor] | None = None) -> None:
    """Writes adapter_model.safetensors and adapter_config.json, each whole or not at all.

    adapter: the full tensors of sharded layers (gather_adapter). PEFT would also ask the hub whether the vocabulary has
    grown, and leave a README, which is a form to be filled in: neither happens.
    """

    def write(aside: Path) -> None:
        model.save_pretrained(str(aside), state_dict=adapter, save_embedding_layers=False)

    _write_each_whole(Path(folder), write, (ADAPTER_WEIGHTS, ADAPTER_CONFIG))


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the tokenizer's files and its chat template, each whole or not at all."""
    _write_each_whole(folder, tokenizer.save_pretrained)


def save_generation_config(model: PeftModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes generation_config.json: the base's, and the end of a turn in the template's format ends an answer."""
    generation = model.generation_config
    generation.eos_token_id = stop_ids(tokenizer, generation.eos_token_id)
    generation.pad_token_id = tokenizer.pad_token_id
    _write_each_whole(folder, generation.save_pretrained)


def _write_each_whole(folder: Path, write: Callable[[Path], object], names: Sequence[str] = ()) -> None:
    """Calls `write` with a folder aside, and moves the files from there, `names` or all. A failure leaves nothing."""
    aside = folder / SAVING
    folder.mkdir(parents=True, exist_ok=True)
    remove(aside)
    try:
        write(aside)
        for name in names or sorted(path.name for path in aside.iterdir()):
            replace_atomically(aside / name, folder / name)
    finally:
        remove(aside)
