"""What of a run may be shared: adapter, tokenizer and model card, without a path of this machine."""

import json
from pathlib import Path

from common.adapter.find import TrainedAdapter
from common.machine.hub_upload import HubFile
from common.recipe import UserError
from common.run.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MODEL_CARD
from common.run.model_card import card_for, is_local_model, name_of_folder, write_model_card

TOKENIZER_FILES = ("chat_template.jinja", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json")


def files_to_share(adapter: TrainedAdapter, repository: str) -> list[HubFile]:
    """The files to upload. A card that is missing is written first; one that is there, and may be edited, is taken.

    A local base is named by its folder's name alone. Raises UserError as write_model_card and for a dry run, and
    OSError.
    """
    folder = adapter.folder
    if adapter.recipe.model.weights == "random":
        raise UserError(f"the run in {folder} had random weights, a dry run: there is no base to go with it")
    if not (folder / MODEL_CARD).exists():
        write_model_card(folder)
    card = (folder / MODEL_CARD).read_text(encoding="utf-8")
    files = [HubFile(MODEL_CARD, card_for(card, repository).encode())]
    files += [HubFile(ADAPTER_CONFIG, _config_to_share(folder / ADAPTER_CONFIG))]
    names = (ADAPTER_WEIGHTS, *TOKENIZER_FILES)
    return files + [HubFile(name, folder / name) for name in names if (folder / name).is_file()]


def _config_to_share(path: Path) -> bytes:
    text = path.read_text(encoding="utf-8")
    values = json.loads(text)
    base = values.get("base_model_name_or_path")
    if not base or not is_local_model(base):
        return text.encode()
    return (json.dumps(values | {"base_model_name_or_path": name_of_folder(base)}, indent=2) + "\n").encode()
