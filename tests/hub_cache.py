"""Lays SmolLM2-135M-Instruct out as the hub's cache has it, so that its recipe runs without the hub.

python -m tests.hub_cache HOME    # then HF_HOME=HOME HF_HUB_OFFLINE=1 make finetune MODEL=smollm2-135m
"""

import sys
from pathlib import Path

REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
COMMIT = "0" * 40  # what the hub's own snapshot is named after; any commit will do offline


def write_hub_cache(model_folder: Path, home: Path) -> Path:
    """Writes `home`, to be HF_HOME, with the folder's files as the main branch of REPOSITORY. Returns the snapshot.

    The files are links, as those of the hub's cache are.
    """
    cached = home / "hub" / f"models--{REPOSITORY.replace('/', '--')}"
    snapshot = cached / "snapshots" / COMMIT
    snapshot.mkdir(parents=True, exist_ok=True)
    (cached / "refs").mkdir(exist_ok=True)
    (cached / "refs" / "main").write_text(COMMIT)
    for file in model_folder.iterdir():
        link = snapshot / file.name
        link.unlink(missing_ok=True)
        link.symlink_to(file.resolve())
    return snapshot


if __name__ == "__main__":
    from tests.real_weights import real_weights

    print(write_hub_cache(real_weights(), Path(sys.argv[1])))
