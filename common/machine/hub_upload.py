"""Uploads files to a model's repository on the Hugging Face hub, in one commit: all of them, or none."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import GatedRepoError, OIDCError, RepositoryNotFoundError

from common.machine.hub import HubRepository, chain_of, first_line, hub_errors_in_words
from common.machine.slow_work import report_slow_work
from common.process_state import quiet_hub_uploads
from common.recipe import UserError


class HubFile(NamedTuple):
    """A file to upload: its name there, and its content or the path of it."""

    name: str
    content: bytes | Path

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


@dataclass(frozen=True)
class FoundRepository:
    """What the hub has under a name before anything is uploaded."""

    exists: bool
    private: bool = True
    files: frozenset[str] = frozenset()
    commit: str | None = None


class HubModel:
    """A model's repository on the hub, as the user who is logged in may use it. The token stays in the library."""

    def __init__(self, name: str) -> None:
        """name: owner/name. Raises UserError when it has another form, and when nobody is logged in."""
        if name.count("/") != 1 or not all(name.split("/")):
            raise UserError(
                f"REPO is {name!r}; write it as owner/name, where the owner is you or an organisation on the hub"
            )
        try:
            token = get_token()
        except (OIDCError, OSError) as error:
            raise UserError(f"the token for the hub cannot be had: {first_line(error)}") from error
        if token is None:
            raise UserError(
                "nobody is logged in at the hub: make a token that may write on "
                "https://huggingface.co/settings/tokens, then .venv/bin/hf auth login"
            )
        self.name, self.api = name, HfApi(token=token)

    @property
    def page(self) -> str:
        return f"{constants.ENDPOINT}/{self.name}"

    def look(self) -> FoundRepository:
        """Asks the hub what is there. Raises UserError where it does not answer or refuses, or where it has moved."""
        with self._errors_in_words():
            try:
                found = self.api.model_info(self.name)
            except GatedRepoError:  # somebody else's, or one that this token may not read
                raise
            except RepositoryNotFoundError:
                return FoundRepository(exists=False)
        if found.id.lower() != self.name.lower():
            raise UserError(f"{self.name} has moved on the hub: REPO={found.id}")
        files = frozenset(file.rfilename for file in found.siblings or ())
        return FoundRepository(True, bool(found.private), files, found.sha)

    def create(self, *, private: bool) -> None:
        """Makes the repository, empty. Raises UserError where the hub refuses, or has one of that name."""
        with self._errors_in_words():
            self.api.create_repo(self.name, private=private)

    def upload(self, files: Sequence[HubFile], message: str) -> str:
        """Uploads the files in one commit, and asks whether they are there. Returns the commit.

        Raises UserError where the hub does not take them all.
        """
        quiet_hub_uploads()
        total = sum(file.size for file in files)
        operations = [CommitOperationAdd(file.name, file.content) for file in files]
        with self._errors_in_words(), report_slow_work(f"uploading {total / 2**20:,.0f} MiB"):
            commit = self.api.create_commit(self.name, operations, commit_message=message).oid
            there = {file.rfilename for file in self.api.model_info(self.name, revision=commit).siblings or ()}
        if missing := [file.name for file in files if file.name not in there]:
            raise UserError(
                f"{self.page} did not take {', '.join(missing)}, perhaps for a .gitignore in the repository: remove "
                "that there, then try again"
            )
        return commit

    @contextlib.contextmanager
    def _errors_in_words(self) -> Iterator[None]:
        repository = HubRepository("model", self.name, None, "try again from another network", uploads=True)
        try:
            with hub_errors_in_words(repository):
                yield
        except UserError as error:
            refused = error.__cause__
            if isinstance(refused, ValueError) and "Invalid metadata in README.md" in str(refused):
                said = " ".join(str(refused).removeprefix("Invalid metadata in README.md.").split())
                raise UserError(
                    f"the hub does not take the head of README.md, between its lines ---: {said}. Correct it in the "
                    "folder of the run"
                ) from refused
            raise
        except (OSError, ValueError, RuntimeError) as error:  # hf_xet's and the library's own, such as a damaged answer
            reason = first_line(chain_of(error)[-1])
            raise UserError(f"{self.name} did not take the files: {reason}. Nothing was changed there") from error
