"""Makes 4-bit checkpoints for benchmarks; nothing is downloaded.

python -m benchmarks.models llama3-8b FOLDER       # random weights; for `tiny`, which ships, its own
"""

import argparse
import importlib
import sys
from dataclasses import replace
from pathlib import Path

from common.model.loading import load_4bit, load_tokenizer
from common.recipe import Recipe


def recipe_of(name: str) -> Recipe:
    """The RECIPE of recipes/<name>.py."""
    recipe: Recipe = importlib.import_module(f"recipes.{name.replace('-', '_')}").RECIPE
    return recipe


def make_checkpoint(name: str, folder: Path) -> None:
    """Writes the recipe's model in NF4 as an ordinary checkpoint into `folder`, with its tokenizer."""
    spec = recipe_of(name).model
    if name != "tiny":
        spec = replace(spec, weights="random")
    tokenizer, model = load_tokenizer(spec), load_4bit(spec)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    make_checkpoint(args.model, args.folder)
    sys.exit(0)
