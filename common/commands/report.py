"""`make report`: writes the report.html of a run again, or shows how far one is that has not ended."""

import argparse
from pathlib import Path

from common.recipe import Recipe
from common.run.folder import RunUnderWay, hold_for_reading


def run_report(recipe: Recipe, _flags: argparse.Namespace) -> None:
    from common.run.report import write_report

    folder = Path(recipe.out)
    try:
        with hold_for_reading(recipe.out):
            print(f"written: {write_report(folder)}")
            return
    except RunUnderWay:
        path = write_report(folder, under_way=True)
    try:
        with hold_for_reading(recipe.out):  # it has ended meanwhile, and its own page may be gone
            path = write_report(folder)
    except RunUnderWay:
        print("the run is under way: the page shows it as far as it is")
    print(f"written: {path}")
