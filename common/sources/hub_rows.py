"""Reads rows of a data set on the Hugging Face hub."""

import contextlib
import re
from collections import Counter
from collections.abc import Iterator

from common.machine.hub import HubRepository, chain_of, first_line, gated, hub_errors_in_words, not_found
from common.machine.slow_work import report_slow_work
from common.recipe import Kind, UserError
from common.sources.arrow_files import dataset_rows
from common.sources.source_row import PlacedRow


def hub_rows(
    name: str,
    split: str,
    revision: str | None,
    config: str | None,
    unread: Counter[str],
    columns: dict[str, str] | None = None,
    kind: Kind | None = "conversations",
) -> Iterator[PlacedRow]:
    """Yields every row of a hub data set's split, each with its place, with the columns that its format reads.

    config: one of the data set's configurations, where it has several. unread: as of read_rows.

    Raises UserError when the data set cannot be had, or read as a whole.
    """
    import datasets

    caches = (str(datasets.config.HF_DATASETS_CACHE),)
    repository = HubRepository("data set", name, revision, "give a file: DATA=my_chats.jsonl", caches)
    with (
        _unusable_in_words(repository),
        hub_errors_in_words(repository),
        report_slow_work(f"reading the data set {name} of the hub"),
    ):
        rows = datasets.load_dataset(name, config, split=split, revision=revision)
    part = f"{config}, {split}" if config else split
    yield from dataset_rows(rows, f"{name} [{part}]", unread, columns, kind)


@contextlib.contextmanager
def _unusable_in_words(repository: HubRepository) -> Iterator[None]:
    """Raises UserError for a data set that is there and that `datasets` cannot make rows of."""
    import datasets
    import pyarrow
    import yaml  # type: ignore[import-untyped]

    a_file = (
        f"take one file of it: hf download {repository.name} FILE --repo-type dataset --local-dir ., then DATA=FILE"
    )
    about = f"data set {repository.name}"
    try:
        yield
    except datasets.exceptions.DatasetNotFoundError as error:
        raise (gated if "gated" in str(error) else not_found)(repository) from error
    except (datasets.data_files.EmptyDatasetError, datasets.exceptions.DataFilesNotFoundError) as error:
        raise UserError(
            f"{about} has no data files of a kind that can be read; see {repository.page}/tree/main"
        ) from error
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        raise UserError(
            f"{about} is a program, {str(error).split()[-1]}, which is not run. If its page has a branch "
            "refs/convert/parquet, take that: DataSpec(revision='refs/convert/parquet'); or give a file: "
            "DATA=my_chats.jsonl"
        ) from error
    except (
        datasets.exceptions.DatasetsError,
        pyarrow.ArrowException,
        yaml.YAMLError,
        ValueError,
        OSError,
    ) as error:
        raise _unreadable(error, about, a_file) from error


def _unreadable(error: Exception, about: str, a_file: str) -> UserError:
    """The error in words. about: the data set. a_file: how to take one file of it instead."""
    import datasets

    chain, text = chain_of(error), str(error)
    for cause in chain:
        if isinstance(cause, datasets.table.CastError):
            return UserError(f"the files of {about} have different columns: {cause.details().rstrip('.')}; {a_file}")
    if found := re.search(r"available configs: \[(.*?)\]", text):
        return UserError(
            f"{about} has several configurations ({found[1]}), and a run takes one: set DataSpec(config=...)"
        )
    if found := re.search(r"BuilderConfig (.*) not found. Available: \[(.*)\]", text):
        return UserError(
            f"{about} has no configuration {found[1]}; set DataSpec(config=...) to one of those it has: {found[2]}"
        )
    if found := re.search(r'Unknown split "(.*?)". Should be one of \[(.*)\]', text):
        return UserError(
            f"{about} has no split {found[1]!r}; set DataSpec(split=...), or eval_split for eval_source, to one of "
            f"those it has: {found[2]}"
        )
    if isinstance(error, datasets.exceptions.DatasetGenerationError) and len(chain) > 1:
        return UserError(f"{about} has a damaged file: {first_line(chain[1])}; {a_file}")
    return UserError(f"{about} cannot be read: {first_line(error)}")
