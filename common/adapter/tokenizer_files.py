"""The tokenizer, chat template and generation config that go with an adapter, for the folder of a merged model.

An adapter from elsewhere often is two files alone. Then all three come from its base, and the generation config learns
where the template ends a turn.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from common.adapter.find import TrainedAdapter
from common.model.generation_config import GENERATION_CONFIG, read_generation_config
from common.recipe import UserError
from common.tokens.stop_ids import stop_ids

CHAT_TEMPLATE = "chat_template.jinja"


def trained_generation_config(
    adapter: TrainedAdapter, base: Path, tokenizer: PreTrainedTokenizerFast
) -> dict[str, Any]:
    """The values of the adapter's generation_config.json, of the base's, or of its config.json; stop ids are complete.

    base: its folder. What is not valid is left out, as read_generation_config says. Raises UserError as stop_ids.
    """
    known = _read_object(base / "config.json").get("eos_token_id")
    folder = next((f for f in (adapter.folder, base) if (f / GENERATION_CONFIG).exists()), None)
    values = {"bos_token_id": tokenizer.bos_token_id}
    if folder is not None:
        values = read_generation_config(folder, str(folder)).to_diff_dict()
    values["eos_token_id"] = stop_ids(tokenizer, values.get("eos_token_id", known))
    if values.get("pad_token_id") is None:
        values["pad_token_id"] = tokenizer.pad_token_id
    return values


def write_tokenizer(adapter: TrainedAdapter, base: Path, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the tokenizer, its template and the generation config into `folder`.

    The files are the base's, which every tool can read; those beside the adapter where the base has none, or where the
    adapter's has other tokens. Raises UserError as trained_generation_config.
    """
    ours = adapter.folder
    _write(folder / GENERATION_CONFIG, trained_generation_config(adapter, base, tokenizer))
    source = base if not (ours / "tokenizer.json").exists() or _same_tokens(base, ours) else ours
    if not (source / "tokenizer.json").exists():  # the base has older files alone
        tokenizer.save_pretrained(folder)
        return
    for name in ("tokenizer.json", "special_tokens_map.json"):
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    settings = source / "tokenizer_config.json"
    if settings.exists():
        values = _read_object(settings)
        if tokenizer.chat_template:  # which is written as a file: two could differ
            values.pop("chat_template", None)
        _write(folder / settings.name, values)
    if tokenizer.chat_template:
        (folder / CHAT_TEMPLATE).write_text(tokenizer.chat_template, encoding="utf-8")


def _same_tokens(one: Path, other: Path) -> bool:
    """Whether the tokenizers in two folders give the same ids to the same tokens."""
    files = [folder / "tokenizer.json" for folder in (one, other)]
    if not all(file.exists() for file in files):
        return False
    tokens = []
    for file in files:
        values = _read_object(file)
        added = {token["content"]: (token["id"], token["special"]) for token in values.get("added_tokens") or []}
        tokens.append((values["model"].get("vocab"), added))
    return bool(tokens[0] == tokens[1])


def _read_object(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read as a JSON object: {error}") from error


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
