"""What goes wrong with the Hugging Face hub, in words: the connection, the hub's answers, the cache (hub_cache).

The libraries wrap one error in another, and call many of them missing files. So the whole chain of causes is read.
"""

import contextlib
import json
import os
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass

from filelock import Timeout
from huggingface_hub import constants
from huggingface_hub.errors import (
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from common.machine.hub_cache import cache_error
from common.recipe import UserError

# huggingface_hub lets the errors of its HTTP library through, such as time-outs and broken connections. Which library
# that is changes between its versions: httpx, then httpx2. In both, such errors derive from a class HTTPError, and
# HfHubHTTPError derives from the same class. So it is found among the base classes, without a name of the library.
_BASES_BY_NAME = {base.__name__: base for base in HfHubHTTPError.__mro__}
TransportError: type[Exception] = _BASES_BY_NAME["HTTPError"]
_CONNECTION_ERRORS = (TransportError, ConnectionError, TimeoutError, socket.gaierror, ssl.SSLError)
_PROXY_VARIABLES = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY", "HF_ENDPOINT")


@dataclass(frozen=True)
class HubRepository:
    """What was asked of the hub, for the words about it."""

    kind: str  # "model" or "data set"
    name: str
    revision: str | None
    instead: str  # what to do where the hub cannot be reached
    caches: tuple[str, ...] = ()  # folders beside the hub's cache that it is put in
    uploads: bool = False  # whether something is sent there, and not read

    @property
    def page(self) -> str:
        return f"https://huggingface.co/{'datasets/' if self.kind == 'data set' else ''}{self.name}"


@contextlib.contextmanager
def hub_errors_in_words(repository: HubRepository) -> Iterator[None]:
    """Raises UserError for an error of the connection, the hub or the cache. Any other error passes."""
    try:
        yield
    except Exception as error:
        words = _cause_in_words(error, repository) or _no_connection(error, repository)
        if words is None:
            raise
        raise words from error


def chain_of(error: BaseException) -> list[BaseException]:
    """Returns the error and what led to it, the last first; down to an answer of the hub, where there was one."""
    chain: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in chain:
        chain.append(following)
        answered = isinstance(following, HfHubHTTPError)
        following = None if answered else following.__cause__ or following.__context__
    return chain


def first_line(error: BaseException) -> str:
    """Returns the first line of the error's message; its type where there is none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def gated(repository: HubRepository) -> UserError:
    return UserError(
        f"{repository.name} is gated. Ask for access on {repository.page}, then log in with: .venv/bin/hf auth login"
    )


def not_found(repository: HubRepository) -> UserError:
    return UserError(
        f"the hub has no {repository.kind} {repository.name} that you may read"
        f"{' (or there is no file of that name)' if repository.kind == 'data set' else ''}. Check the name on "
        f"{repository.page}; if it is private, log in with: .venv/bin/hf auth login"
    )


def _cause_in_words(error: Exception, repository: HubRepository) -> UserError | None:
    """The words for the first error of the chain that says more than that there is no connection."""
    name = repository.name
    if isinstance(error, json.JSONDecodeError):
        return _no_hub(repository)
    for cause in chain_of(error):
        text = str(cause)
        if isinstance(cause, GatedRepoError):
            return gated(repository)
        if isinstance(cause, RevisionNotFoundError):
            return UserError(f"{name} has no revision {repository.revision!r}; see {repository.page}/tree/main")
        if isinstance(cause, RepositoryNotFoundError):
            return _refused_upload(404, "", repository) if repository.uploads else not_found(repository)
        if isinstance(cause, HFValidationError):
            return UserError(f"{name} is no id of the hub: {first_line(cause)}")
        if isinstance(cause, FileMetadataError):
            return _no_hub(repository)
        if isinstance(cause, HfHubHTTPError) and not isinstance(cause, RemoteEntryNotFoundError):
            if repository.uploads:
                said = cause.response.headers.get("X-Error-Message", "")
                return _refused_upload(cause.response.status_code, said, repository)
            return _refused(cause.response.status_code, repository)
        if isinstance(cause, ImportError) and "socksio" in text:
            return UserError(
                "a proxy variable names a SOCKS proxy (socks5://...), for which a package is missing: .venv/bin/pip "
                "install socksio (with the variable unset, where pip cannot use that proxy either)"
            )
        if type(cause).__name__ == "InvalidURL" or "scheme for proxy URL" in text:
            return UserError(
                f"an address in the environment is none ({first_line(cause)}): correct or unset {_set_of_proxies()}"
            )
        if isinstance(cause, _CONNECTION_ERRORS) and type(cause) not in (ConnectionError, Timeout):
            return None  # what led to it are errors of a socket
        if not repository.uploads and (words := cache_error(cause, name, repository.caches)) is not None:
            return words
    return None


def _no_connection(error: Exception, repository: HubRepository) -> UserError | None:
    """The words where no answer came; None where that is not what happened."""
    chain = chain_of(error)
    lost = [cause for cause in chain if isinstance(cause, _CONNECTION_ERRORS) and type(cause) is not ConnectionError]
    lost += [cause for cause in chain if isinstance(cause, (LocalEntryNotFoundError, ConnectionError))]
    lost = [cause for cause in lost if not isinstance(cause, RemoteEntryNotFoundError)]
    if not lost:
        return None
    return _unreachable("HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else first_line(lost[0]), repository)


def _unreachable(reason: str, repository: HubRepository) -> UserError:
    if repository.uploads:
        return UserError(f"the hub cannot be reached ({reason}), and nothing was changed there: try again when it can")
    return UserError(
        f"{repository.name} is not in the local cache and the hub cannot be reached ({reason}). Connect and try again, "
        f"or {repository.instead}"
    )


def _no_hub(repository: HubRepository) -> UserError:
    return UserError(
        f"what answers at {constants.ENDPOINT} is not the hub, perhaps the login page of a network or a proxy. Log in "
        f"there, correct HF_ENDPOINT, or {repository.instead}"
    )


def _refused(status: int, repository: HubRepository) -> UserError:
    """The words for an answer with an error's status."""
    name = repository.name
    if status == 429:
        return UserError(
            f"the hub has had too many requests from here (429) and does not send {name}: wait some minutes; more are "
            "allowed to who logs in: .venv/bin/hf auth login"
        )
    if status in (401, 403):
        return UserError(
            f"the hub does not let you read {name} ({status}): a token that is out of date or lacks the right to, "
            "perhaps in HF_TOKEN. Make one on https://huggingface.co/settings/tokens, then log in with: .venv/bin/hf "
            "auth login"
        )
    if status >= 500:
        return _unreachable(f"it answers with its error {status}", repository)
    return UserError(f"the hub does not send {name}: it answers {status}. See {repository.page}")


def _refused_upload(status: int, said: str, repository: HubRepository) -> UserError:
    """The words for an answer with an error's status to what was sent. said: the hub's own words."""
    name = repository.name
    if status == 409:
        return UserError(
            f"the hub has something else under the name {name} that you may not see: choose another, REPO=..."
        )
    if status == 429:
        return UserError(
            f"the hub has had too many requests from here (429): wait some minutes, then upload {name} again"
        )
    if status >= 500:
        return _unreachable(f"it answers with its error {status}", repository)
    if status in (401, 403, 404):
        return UserError(
            f"the hub does not let you write to {name} ({status}). The owner must be you or an organisation that lets "
            "you, and the token, perhaps in HF_TOKEN, must have the right to write: make one on "
            "https://huggingface.co/settings/tokens, then log in with: .venv/bin/hf auth login"
        )
    return UserError(f"the hub does not take {name}: it answers {status}{f' ({said})' if said else ''}")


def _set_of_proxies() -> str:
    """The variables that are set among those that hold an address."""
    found = [name for name in _PROXY_VARIABLES if name in os.environ or name.lower() in os.environ]
    return " or ".join(found or _PROXY_VARIABLES)
