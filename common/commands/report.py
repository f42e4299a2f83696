"""`make report`: writes the report.html of a run again."""

import argparse
from pathlib import Path

from common.recipe import Recipe


def run_report(recipe: Recipe, _flags: argparse.Namespace) -> None:
    from common.run.report import write_report

    print(f"written: {write_report(Path(recipe.out))}")
