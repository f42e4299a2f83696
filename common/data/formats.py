"""The formats of rows: which keys, or columns, of a source each of them reads."""

from functools import lru_cache
from typing import NamedTuple

from common.data.source_row import BadRow


class Format(NamedTuple):
    name: str
    keys: tuple[str, ...]  # which every row of this format has
    optional: tuple[str, ...] = ()


# A row is of the first format whose keys it has.
FORMATS = (
    Format("messages", ("messages",)),
    Format("ShareGPT", ("conversations",)),
    Format("prompt/completion", ("prompt", "completion")),
    Format("Alpaca", ("instruction", "output"), ("input",)),
    Format("text", ("text",)),
)
WANTED_KEYS = ", or ".join("+".join(known.keys) for known in FORMATS)


# Keys of what is no text: a row that has a value there cannot be trained without it.
MEDIA_KEYS = ("images", "image", "videos", "video", "audios", "audio")


class MatchedKeys(NamedTuple):
    """The format that a row's names fit, and from each key of the format to its place among those names."""

    format_name: str
    places: dict[str, int]


def match_keys(names: tuple[str, ...], columns: dict[str, str] | None = None) -> MatchedKeys | None:
    """Finds the format of a row with these names, and the names that it reads. None where no format fits.

    A name may be in another case, with blanks around it. Raises BadRow when two names could be meant by one key.
    """
    return _match(names)


@lru_cache(maxsize=16)  # a file has one set of names, or a few
def _match(names: tuple[str, ...]) -> MatchedKeys | None:
    folded = [_fold(name) for name in names]
    for there in (set(names), set(folded)):
        for known in FORMATS:
            if there.issuperset(known.keys):
                read = [key for key in (*known.keys, *known.optional) if key in folded]
                for key in read:
                    if (count := folded.count(key)) > 1:
                        found = [name for name, same in zip(names, folded, strict=True) if same == key]
                        raise BadRow(f"{count} keys could be {key!r}: {found!r:.80}; leave one")
                return MatchedKeys(known.name, {key: folded.index(key) for key in read})
    return None


def is_media(name: str) -> bool:
    return _fold(name) in MEDIA_KEYS


def _fold(name: str) -> str:
    """The name in lower case, without the blanks and marks around it that editors and Excel leave."""
    return name.strip().strip("\ufeff\u200b\u2060").strip().lower()
