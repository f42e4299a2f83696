"""`make compare`: runs side by side, in the terminal and on a page. It takes folders of runs, and no recipe."""

import argparse
import glob
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from common.exit_status import exit_status
from common.machine.paths import output_path
from common.recipe import UserError
from common.run.folder import refuse_inside

PAGE = "compare.html"


def run_compare(arguments: Sequence[str]) -> int:
    """Prints and writes the comparison. Returns the exit status, as exit_status describes it.

    The page lies beside the folder of the first run, or where --to says.
    """
    parser = argparse.ArgumentParser(prog="make compare RUNS=... ARGS=...", allow_abbrev=False)
    parser.add_argument("--runs", default="", metavar="FOLDERS", help='two or more: "outputs/a outputs/b", "outputs/*"')
    parser.add_argument("--to", type=output_path, metavar="FILE", help="the page (default: beside the first run)")
    flags = parser.parse_args(arguments)

    def act() -> None:
        from common.run.compare import as_text, compare_runs, write_page

        folders = folders_of(flags.runs)
        comparison = compare_runs(folders)
        page = flags.to or folders[0].parent / PAGE
        for folder in folders:
            refuse_inside(page, str(folder), "TO")
        print(as_text(comparison, shutil.get_terminal_size((100, 24)).columns))
        write_page(comparison, page)
        print(f"\nside by side on a page: {page}")

    return exit_status(act, flags.runs)


def folders_of(typed: str) -> list[Path]:
    """The folders that RUNS names: words as of a shell, in which * stands for any name.

    Of what a pattern finds, those with a run.json. Raises UserError for a pattern that finds none.
    """
    try:
        words = shlex.split(typed)
    except ValueError as error:
        raise UserError(f"RUNS is {typed!r}, which has a quotation mark without its end") from error
    folders: list[Path] = []
    for word in words:
        path = output_path(word)
        if glob.has_magic(word) and not path.exists():
            found = sorted(Path(name).parent for name in glob.glob(f"{path}/run.json"))
            if not found:
                raise UserError(f"RUNS has {word}, which finds no folder of a run that has ended")
            folders += found
        else:
            folders.append(path)
    return folders
