"""The formats of rows: which keys, or columns, of a source each of them reads."""

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from common.recipe import Kind
from common.sources.learn_flags import LEARN_FLAGS, UNCLEAR_FLAGS
from common.sources.other_kind import has_no_rating, has_pairs, is_no_pair
from common.sources.source_row import BadRow

SYSTEM_KEYS = ("system", "system_prompt")
REASONING_KEYS = ("reasoning_content", "thinking")  # of a row: reasoning alone may be a judge's
LABEL_KEYS = ("label", "kto_tag")  # KTO's; a label that is neither true nor false is a column like any other
MEDIA_KEYS = (
    *("images", "image", "image_path", "image_url"),
    *("videos", "video", "video_path", "video_url"),
    *("audios", "audio", "audio_path", "audio_url"),
)

_OF_CHATS = (*SYSTEM_KEYS, "tools", "functions", "chat_template_kwargs")
_OF_PAIRS = (*_OF_CHATS, "history", *REASONING_KEYS)
_CHECKED = (*MEDIA_KEYS, *LEARN_FLAGS)  # in rows of every format
_CHECKED_IN_CHATS = (*_CHECKED, *LABEL_KEYS, *UNCLEAR_FLAGS)
_MARKS_OF_PAIRS = (
    ("chosen", "rejected"),
    ("rejected_response",),
    ("rejected_messages",),
    ("preferred_output", "non_preferred_output"),
)


class Format(NamedTuple):
    name: str
    keys: tuple[str, ...]  # which every row of this format has
    optional: tuple[str, ...] = ()
    is_pair: bool = False  # of a better and a worse answer


# A row is of the first format whose keys it has. Plain text is the last: beside another it is that one, rendered.
FORMATS = (
    Format("messages", ("messages",), _OF_CHATS),
    Format("ShareGPT", ("conversations",), _OF_CHATS),
    Format("conversation", ("conversation",), _OF_CHATS),
    Format("prompt/completion", ("prompt", "completion"), _OF_PAIRS),
    Format("Alpaca", ("instruction", "output"), ("input", "context", *_OF_PAIRS)),
    Format("instruction/response", ("instruction", "response"), ("input", "context", *_OF_PAIRS)),
    Format("question/answer", ("question", "answer"), ("context", *_OF_PAIRS)),
    Format("question/response", ("question", "response"), ("context", *_OF_PAIRS)),
    Format("query/response", ("query", "response"), _OF_PAIRS),
    Format("input/output", ("input", "output"), _OF_PAIRS),
    Format("prompt/response", ("prompt", "response"), _OF_PAIRS),
    Format("problem/solution", ("problem", "solution"), _OF_PAIRS),
    Format("user/assistant", ("user", "assistant"), _OF_PAIRS),
    Format("text", ("text",), ("role",)),
)
_ANSWERS = (("chosen", "rejected"), ("chosen_response", "rejected_response"))
_ABOUT_OF = {"instruction": ("input", "context"), "question": ("context",)}
# The same of pairs. The last two keys are the better answer and the worse one, before them is the prompt; without it
# the better one is a whole conversation.
PAIR_FORMATS = (
    *(
        Format(f"{prompt}/{chosen}/{rejected}", (prompt, chosen, rejected), (*_ABOUT_OF.get(prompt, ()), *more), True)
        for more, prompts in (
            ((*_OF_CHATS, "history"), ("prompt", "instruction", "question", "query", "problem", "user", "input")),
            (_OF_CHATS, ("messages", "conversations", "conversation")),
        )
        for prompt in prompts
        for chosen, rejected in _ANSWERS
    ),
    Format(
        "query/response/rejected_response", ("query", "response", "rejected_response"), (*_OF_CHATS, "history"), True
    ),
    Format(
        "input/preferred_output", ("input", "preferred_output", "non_preferred_output"), _OF_CHATS, True
    ),  # OpenAI's
    Format("messages/rejected_messages", ("messages", "rejected_messages"), _OF_CHATS, True),  # ms-swift's
    Format("messages/rejected_response", ("messages", "rejected_response"), _OF_CHATS, True),  # ms-swift's
    Format("chosen/rejected", ("chosen", "rejected"), _OF_CHATS, True),  # TRL's, without a prompt
)
FORMAT_OF = {known.name: known for known in (*FORMATS, *PAIR_FORMATS)}
# None reads all kinds.
FORMATS_OF: dict[Kind | None, tuple[Format, ...]] = {
    "conversations": FORMATS,
    "pairs": PAIR_FORMATS,
    "rated": tuple(known for known in FORMATS if known.name != "text"),
    None: (*PAIR_FORMATS, *FORMATS),
}
_OR_OTHERS = "or those of another format in docs/data.md; or say which of yours they are: DataSpec(columns={{{}}})"
WANTED_KEYS: dict[Kind | None, str] = {
    "conversations": "messages, prompt+completion, instruction+output, text "
    + _OR_OTHERS.format("'user': ..., 'assistant': ..."),
    "pairs": "prompt+chosen+rejected, chosen+rejected "
    + _OR_OTHERS.format("'user': ..., 'chosen': ..., 'rejected': ..."),
    "rated": "prompt+completion+label, messages+label "
    + _OR_OTHERS.format("'user': ..., 'assistant': ..., 'label': ..."),
}
WANTED_KEYS[None] = WANTED_KEYS["conversations"]


class MatchedKeys(NamedTuple):
    """The format that a row's names fit, and where among them is what it reads."""

    format_name: str
    # From a name to its place among the row's. A row with these names alone matches in the same way: they are the keys
    # of the format, what is checked in every row, and other formats' keys that might say something else.
    places: dict[str, int]
    fields: dict[str, int]  # from each key that the format reads, or that is checked, to its place
    rivals: dict[str, dict[str, int]]  # the other formats that fit too, each with its fields
    unread: tuple[tuple[str, int], ...]  # the other names, each with its place


def match_keys(
    names: tuple[str, ...], columns: dict[str, str] | None = None, kind: Kind | None = "conversations"
) -> MatchedKeys | None:
    """Finds the format of a row with these names, and the names that it reads. None where no format fits.

    A name may be in another case, with blanks around it. columns: DataSpec's, which decides the format. kind:
    DataSpec's; None takes any. Raises BadRow when two names could be meant by one key, and when a name of `columns` is
    not there. Raises OtherKind for the names of another kind of data, unless `columns` says what to learn.
    """
    return _match(names, tuple(columns.items()) if columns else (), kind)


@lru_cache(maxsize=256)  # a file has one set of names, or a few
def _match(names: tuple[str, ...], columns: tuple[tuple[str, str], ...], kind: Kind | None) -> MatchedKeys | None:
    folded = fold_names(names)
    if columns:
        return _match_columns(names, folded, dict(columns))
    marks = next((keys for keys in _MARKS_OF_PAIRS if set(folded).issuperset(keys)), None)
    if marks and kind in ("conversations", "rated"):
        raise has_pairs(marks, rated=kind == "rated")
    fitting = _fitting(names, folded, FORMATS_OF[kind])
    if kind == "pairs" and not (fitting or marks) and (others := _fitting(names, folded, FORMATS)):
        raise is_no_pair(others[0].name, next((key for key in LABEL_KEYS if key in folded), None))
    if kind == "rated" and fitting and not set(folded) & set(LABEL_KEYS):
        raise has_no_rating(fitting[0].name)
    if not fitting:
        return None
    fields = _find_fields(fitting[0], names, folded)
    rivals = {
        known.name: _find_fields(known, names, folded)
        for known in fitting[1:]
        if known.name != "text" and known.is_pair == fitting[0].is_pair and not fields.keys() >= set(known.keys)
    }
    places = {key: place for found in (*rivals.values(), fields) for key, place in found.items()}
    return MatchedKeys(fitting[0].name, places, fields, rivals, _others(names, fields))


def _fitting(names: tuple[str, ...], folded: list[str], formats: tuple[Format, ...]) -> list[Format]:
    """The formats whose keys are all there: as they are written, or else in another case."""
    for there in (set(names), set(folded)):
        if fitting := [known for known in formats if there.issuperset(known.keys)]:
            return fitting
    return []


def _match_columns(names: tuple[str, ...], folded: list[str], columns: dict[str, str]) -> MatchedKeys:
    """The format that the names of `columns` make, which are at the place of its keys."""
    chosen = {}
    for key, name in columns.items():
        same = [place for place, other in enumerate(names) if other == name]
        same = same or [place for place, other in enumerate(folded) if other == _fold(name)]
        if not same:
            raise BadRow(f"it has no {name!r}, which DataSpec(columns=...) names, but {quoted(names)}")
        if len(same) > 1:
            raise BadRow(f"{len(same)} keys could be {name!r}: {[names[n] for n in same]!r:.80}; leave one")
        chosen[key] = same[0]
    known = FORMAT_OF[_format_of_columns(columns)]
    # What was not named is read as always, except under the keys that were.
    open_names = ["" if place in chosen.values() else name for place, name in enumerate(folded)]
    free = tuple(key for key in (*known.optional, *_checked(known)) if key not in chosen)
    found = _find_fields(Format(known.name, (), free), names, open_names)
    fields = found | chosen
    places = found | {columns[key]: place for key, place in chosen.items()}
    return MatchedKeys(known.name, places, fields, {}, _others(names, fields))


def _format_of_columns(columns: dict[str, str]) -> str:
    prompt = next((key for key in ("user", "messages", "text") if key in columns), None)
    if "chosen" in columns:
        return f"{prompt}/chosen/rejected" if prompt else "chosen/rejected"
    return "user/assistant" if prompt == "user" else str(prompt)


def _checked(known: Format) -> tuple[str, ...]:
    if known.is_pair:
        return (*_CHECKED, *UNCLEAR_FLAGS)
    return _CHECKED if known.name == "text" else _CHECKED_IN_CHATS


def _find_fields(known: Format, names: tuple[str, ...], folded: list[str]) -> dict[str, int]:
    """From each key of the format that is among the names to its place. Raises BadRow when two could be meant."""
    wanted = dict.fromkeys((*known.keys, *known.optional, *_checked(known)))
    fields = {key: folded.index(key) for key in wanted if key in folded}
    for key in fields:
        if (count := folded.count(key)) > 1:
            found = [name for name, same in zip(names, folded, strict=True) if same == key]
            raise BadRow(f"{count} keys could be {key!r}: {found!r:.80}; leave one")
    return fields


def _others(names: tuple[str, ...], fields: dict[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple((name, place) for place, name in enumerate(names) if place not in fields.values())


def quoted(names: Iterable[str]) -> str:
    """The first names, as they are shown in an error."""
    return ", ".join(f"{name!r:.40}" for name in list(names)[:8]) or "none"


def fold_names(names: Iterable[str]) -> list[str]:
    return [_fold(name) for name in names]


def is_media(name: str) -> bool:
    """Returns whether a column of this name is for pictures or sounds."""
    return _fold(name) in MEDIA_KEYS


def _fold(name: str) -> str:
    """The name in lower case, without the blanks and marks around it that editors and Excel leave."""
    return name.strip().strip("\ufeff\u200b\u2060").strip().lower()
