"""Rows counted by the reason why they are not used, each reason with its first places."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

MAX_PLACES = 5  # that are named for each reason


@dataclass
class Tally:
    """Counts rows by reason."""

    counts: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)  # the first ones of each reason

    @property
    def total(self) -> int:
        return self.counts.total()

    def add(self, reason: str, places: Iterable[str], count: int = 1) -> None:
        """Counts `count` rows more, of which these are the first places."""
        self.counts[reason] += count
        known = self.places.setdefault(reason, [])
        known.extend(list(places)[: MAX_PLACES - len(known)])

    def merge(self, later: "Tally") -> None:
        """Adds the rows of another tally, which stand behind these in the source."""
        for reason, count in later.counts.items():
            self.add(reason, later.places[reason], count)

    def lines(self, word: str) -> list[str]:
        """A line for each reason, the most frequent first. word: what became of the rows."""
        lines = []
        for reason, count in self.counts.most_common():
            more = f" and {count - MAX_PLACES:,} more" if count > MAX_PLACES else ""
            lines.append(f"  {word} {count:,}: {reason} ({'; '.join(self.places[reason])}{more})")
        return lines

    def most_frequent(self) -> str:
        """The most frequent reason, with its first place."""
        reason, count = self.counts.most_common(1)[0]
        return f"{reason} ({self.places[reason][0]}{f' and {count - 1:,} more' if count > 1 else ''})"
