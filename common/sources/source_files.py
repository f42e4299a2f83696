"""Which files a source names: one, several, a glob, a folder of shards, or a folder that save_to_disk wrote."""

import glob
import os
import re
import shlex
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from common.machine.paths import local_path
from common.recipe import UserError

TEXT_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt")  # may also be compressed: chats.jsonl.gz
TABLE_SUFFIXES = (".parquet", ".arrow")
SUFFIXES = TEXT_SUFFIXES + TABLE_SUFFIXES
COMPRESSED_SUFFIXES = (".gz", ".zst")
KINDS_IN_WORDS = f"{', '.join(TEXT_SUFFIXES)} (each also with .gz or .zst), {' or '.join(TABLE_SUFFIXES)}"

_SPREADSHEET = "is a spreadsheet; save it as CSV in UTF-8"
_DOCUMENT = "is a document; save its text as .txt in UTF-8"
_ARCHIVE = "is an archive; unpack it, and name the files that were in it"
_PACKED = "is packed in a way that is not read; unpack it first, or pack it with gzip or zstd"
_PICKLE = "is a pickle, which is a program; write its rows as .jsonl or .parquet"
# What people bring that is no data file, and the way out
FOREIGN_SUFFIXES = {
    **dict.fromkeys((".xlsx", ".xls", ".xlsm", ".ods"), _SPREADSHEET),
    **dict.fromkeys((".docx", ".doc", ".odt", ".rtf", ".pdf", ".epub"), _DOCUMENT),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar"), _ARCHIVE),
    **dict.fromkeys((".bz2", ".xz", ".lz4", ".br", ".z"), _PACKED),
    **dict.fromkeys((".pkl", ".pickle", ".pt", ".npy", ".npz"), _PICKLE),
}
# Of a file that lies in a folder of shards and says only what they are
_ABOUT_THE_FOLDER = re.compile(r"[._].*|(readme|license)(\..*)?|dataset_infos?\.json", re.IGNORECASE)
# The split that a file is of, by its name: train-00000-of-00003.parquet, as datasets writes it, or train.jsonl
_SHARD = re.compile("(.+?)-[0-9]{5}-of-[0-9]{5}.*")
_SPLIT = re.compile("(train|test|validation|valid|val|dev|eval)(?![a-z]).*", re.IGNORECASE)


class SourceFiles(NamedTuple):
    files: tuple[Path, ...]  # in the order that they are read in
    ignored: tuple[str, ...] = ()  # names of what else lies in the folder
    saved: Path | None = None  # the folder that save_to_disk wrote; `files` are all that is in it


def is_file(source: str) -> bool:
    """Returns whether a source names files, which may be missing, and not a hub data set."""
    if os.path.exists(local_path(source)):
        return True
    parts = _parts(source)
    suffixes = (*SUFFIXES, *COMPRESSED_SUFFIXES, *FOREIGN_SUFFIXES)
    return len(parts) > 1 or any(
        part.lower().endswith(suffixes) or part.startswith((".", "/", "~")) or glob.has_magic(part) for part in parts
    )


def find_files(source: str) -> SourceFiles:
    """Returns the files that a source names, of which is_file is true.

    A path that exists is taken as it stands. Anything else is split into paths and globs as a shell would; a glob's
    files come in natural order: part-2 before part-10. Of a folder all data files are taken, which are of one kind.

    Raises UserError where a file is missing, a glob finds nothing, or a folder can be read in more than one way.
    """
    path = local_path(source)
    if os.path.isdir(path):
        try:
            return _files_of_folder(path)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if os.path.exists(path):
        return SourceFiles((path,))
    parts = _parts(source)
    files = [file for part in parts for file in _files_of_part(part, source if len(parts) > 1 else "")]
    places = Counter(file.resolve() for file in files)
    if len(places) < len(files):
        raise UserError(f"{places.most_common(1)[0][0]} is named twice in {source!r}; leave one of the two")
    return SourceFiles(tuple(files))


def names_without_folders(source: str) -> str:
    """A source of files in words that tell nothing of where they lie."""
    parts = [source] if os.path.exists(local_path(source)) else _parts(source)
    return ", ".join(Path(part).name or "files" for part in parts)


def kind_of(path: Path) -> str:
    """The suffix that says which reader reads a file, without that of its compression.

    Raises UserError, which says what to do, when it is none of SUFFIXES.
    """
    outer = path.suffix.lower()
    name = path.with_suffix("") if outer in COMPRESSED_SUFFIXES else path
    suffix = name.suffix.lower()
    if suffix in TEXT_SUFFIXES or (suffix in TABLE_SUFFIXES and name == path):
        return suffix
    if suffix in TABLE_SUFFIXES:
        raise UserError(f"{path}: a compressed {suffix} file is not read; unpack it first")
    if suffix in FOREIGN_SUFFIXES:
        raise UserError(f"{path} {FOREIGN_SUFFIXES[suffix]}")
    raise UserError(f"{path} is no data file by its name; a name ends in {KINDS_IN_WORDS}")


def _parts(source: str) -> list[str]:
    """The paths and globs in a source. One with an open quote is a single path: an apostrophe in a file's name."""
    try:
        return shlex.split(source)
    except ValueError:
        return [source]


def _files_of_part(part: str, source: str) -> list[Path]:
    """The files of one path or glob. source: what it is a part of, "" where it is all."""
    path = local_path(part)
    among = f", one of the {len(_parts(source))} files in {source!r}" if source else ""
    if not os.path.exists(path) and glob.has_magic(part):
        found = sorted(map(Path, glob.glob(os.path.expanduser(part), recursive=True)), key=natural_order)
        if not found:
            raise UserError(f"no file fits {part!r}{among} (looked in {Path.cwd()})")
    else:
        found = [path]
    for file in found:
        if os.path.isdir(file):
            raise UserError(
                f"{file}{among and among + ','} is a folder; name its files, as in {shlex.quote(f'{file}/')}*.jsonl"
            )
        if not os.path.exists(file):
            hint = "; a name with blanks stands in quotes" if source else ""
            raise UserError(f"there is no data file {file}{among} (looked in {Path.cwd()}){hint}")
    return found


def natural_order(path: Path) -> list[str | int]:
    """A key to sort by: numbers in names count as numbers."""
    # re.split gives texts at even places and numbers at odd ones, so like is compared with like.
    return [int(part) if place % 2 else part for place, part in enumerate(re.split("([0-9]+)", str(path)))]


def _files_of_folder(folder: Path) -> SourceFiles:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return SourceFiles(tuple(sorted(path for path in folder.rglob("*") if path.is_file())), saved=folder)
    kinds: dict[str, list[Path]] = {}
    ignored, folders = [], []
    for path in sorted(folder.iterdir(), key=natural_order):
        if _ABOUT_THE_FOLDER.fullmatch(path.name):
            continue
        try:
            if path.is_dir():
                folders.append(path.name)
            else:
                kinds.setdefault(kind_of(path), []).append(path)
        except UserError:
            ignored.append(path.name)
    if not kinds:
        inside = f"; it has the folders {', '.join(folders)[:200]}: name one" if folders else ""
        raise UserError(f"the folder {folder} has no data files{inside}; a name ends in {KINDS_IN_WORDS}")
    if len(kinds) > 1:
        counts = ", ".join(f"{len(files)} {kind}" for kind, files in kinds.items())
        raise UserError(
            f"the folder {folder} has files of several kinds ({counts}); name those of one: "
            f"{shlex.quote(f'{folder}/')}*{next(iter(kinds))}"
        )
    ((kind, files),) = kinds.items()
    if kind == ".txt" and (beside := [*ignored, *folders]):  # requirements.txt and its like are no documents
        raise UserError(
            f"the folder {folder} has .txt files beside others ({', '.join(beside[:3])}); name those that are to be "
            f"learnt: {shlex.quote(f'{folder}/')}*.txt"
        )
    matches = [_SHARD.fullmatch(path.name) or _SPLIT.fullmatch(path.name) for path in files]
    splits = {found[1] if found else "" for found in matches}
    if len(splits) > 1:
        split = min(splits - {""}, key=lambda name: (not name.startswith("train"), name))
        raise UserError(
            f"the folder {folder} has files of several splits by their names; name those of one: "
            f"{shlex.quote(f'{folder}/')}{split}*{kind}"
        )
    return SourceFiles(tuple(files), (*ignored, *(f"{name}/" for name in folders)))
