"""Where results of benchmarks are kept, and under which name."""

import re
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def result_path(kind: str, folder: Path | None = None) -> Path:
    """<kind>_<this machine's GPU, or cpu>.json in the folder, which is there: benchmarks/results unless given."""
    folder = folder or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return folder / f"{kind}_{re.sub(r'[^a-zA-Z0-9_]+', '_', name).lower()}.json"
