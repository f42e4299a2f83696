"""data/tiny/paraphrases.jsonl: requests that the generator of the training data cannot make, with its conventions."""

import json
import re
from collections.abc import Sequence
from random import Random
from typing import Any

import pytest

from models import tiny_world
from tests.conftest import ROOT
from tests.test_tiny import prompts

SLOT = "§"
CLOCK = re.compile(r"\b(\d{1,2})(?::(\d\d))? (am|pm)\b")
KEYS = {
    "remind": ["tool", "task", "day", "time"],
    "message": ["tool", "to", "text"],
    "timer": ["tool", "label", "minutes"],
    "book": ["tool", "place", "people", "day", "time"],
    "lights": ["tool", "room", "state"],
    "buy": ["tool", "item", "count"],
}


def pairs(name: str) -> list[tuple[str, str]]:
    """(request, answer) of each row."""
    rows = [json.loads(line)["messages"] for line in (ROOT / "data" / "tiny" / name).read_text().splitlines()]
    return [(user["content"], assistant["content"]) for user, assistant in rows]


PARAPHRASES = pairs("paraphrases.jsonl")


class Slots(Random):
    """Draws SLOT for each word and 12 for each number, and keeps the sentences among which the generator chose."""

    def __init__(self) -> None:
        super().__init__(0)
        self.sentences: list[str] = []

    def random(self) -> float:
        return 0.5  # names are not invented, tasks are "VERB the OBJECT", numbers are digits

    def randint(self, low: int, high: int) -> int:
        return high

    def choice(self, options: Sequence[Any]) -> Any:
        if any(SLOT in str(option) for option in options):
            self.sentences += options
        return options[0] if not isinstance(options[0], str) or SLOT in options[0] else SLOT


def sentence_forms() -> list[re.Pattern[str]]:
    """The generator's own templates, with anything at all for what it fills in."""
    forms = []
    for request in tiny_world.REQUESTS:
        rng = Slots()
        _, _, call = request(rng)
        for sentence in rng.sentences:
            for value in call.values():
                if SLOT in str(value):
                    sentence = sentence.replace(str(value), SLOT)  # "the § is §" is one slot, as other texts are
            sentence = re.sub(rf"[\d:]+( {SLOT})?", SLOT, sentence).rstrip(".?")
            forms.append(re.escape(sentence).replace(SLOT, ".+").replace("minutes", "minutes?"))
    return [re.compile(rf"(?<!\w){form}", re.IGNORECASE) for form in forms]


def minus_entities(request: str, answer: str) -> str:
    """The request with a slot for all that its answer takes from it."""
    for value in sorted(map(str, json.loads(answer).values()), key=len, reverse=True):
        request = request.replace(value, SLOT)
    words = "|".join((*tiny_world.DAYS, *tiny_world.NUMBERS))
    return re.sub(rf"\d+|\b(?:{words})\b", SLOT, CLOCK.sub(SLOT, request), flags=re.IGNORECASE)


@pytest.mark.parametrize("name", ["train.jsonl", "held_out.jsonl"])
def test_the_forms_are_all_of_the_generators(name):
    """If a template were missed, the rows that it made would match no form."""
    forms = sentence_forms()
    assert len(forms) == 26
    assert [request for request, _ in pairs(name) if not any(form.match(request) for form in forms)] == []


@pytest.mark.parametrize(("request_", "answer"), PARAPHRASES)
def test_no_form_of_the_generator_occurs_in_a_paraphrase(request_, answer):
    assert [form.pattern for form in sentence_forms() if form.search(request_)] == []


def test_there_are_more_than_110_and_none_has_the_form_of_another():
    assert len(PARAPHRASES) >= 110
    assert len({minus_entities(*pair) for pair in PARAPHRASES}) == len(PARAPHRASES)
    tools = [json.loads(answer)["tool"] for _, answer in PARAPHRASES]
    assert {tool: tools.count(tool) for tool in KEYS} == dict.fromkeys(KEYS, len(PARAPHRASES) // len(KEYS))


def test_no_prompt_of_the_other_files_is_a_paraphrase():
    asked = {request.casefold() for request, _ in PARAPHRASES}
    assert not asked & {request.casefold() for name in ("train.jsonl", "held_out.jsonl") for request in prompts(name)}


@pytest.mark.parametrize(("request_", "answer"), [*PARAPHRASES, *pairs("held_out.jsonl")])
def test_the_answers_follow_the_conventions_of_the_training_data(request_, answer):
    """Written as there, and nothing in an answer that the request does not say. The held-out rows show the same."""
    call = json.loads(answer)
    assert json.dumps(call, separators=(",", ":")) == answer
    assert list(call) == KEYS[call["tool"]]
    for key in ("task", "to", "text", "label", "place", "room", "item"):
        assert call.get(key, "") in request_  # to the letter
    if "day" in call:
        named = [day for day in tiny_world.DAYS if day in request_]
        assert [day.lower() for day in named] == [call["day"]]
    if "time" in call:
        ((hour, minute, half),) = CLOCK.findall(request_)
        assert call["time"] == f"{int(hour) % 12 + 12 * (half == 'pm'):02d}:{int(minute or 0):02d}"
    if call["tool"] == "lights":
        assert call["state"] in ("on", "off")
    for key in {"minutes", "people", "count"} & call.keys():
        text = CLOCK.sub("", request_).lower()
        numbers = [int(digits) for digits in re.findall(r"\d+", text)]
        numbers += [n for n, word in enumerate(tiny_world.NUMBERS, 1) if re.search(rf"\b{word}\b", text)]
        assert numbers == [call[key]]


def test_a_text_and_a_place_are_written_as_the_generator_writes_them():
    calls = [json.loads(answer) for _, answer in PARAPHRASES]
    assert all(re.fullmatch(r"the .+ is .+", call["text"]) for call in calls if "text" in call)
    assert all(re.fullmatch(r"[A-Z]\w+ [A-Z]\w+", call["place"]) for call in calls if "place" in call)
    assert all(re.fullmatch(r"call [A-Z]\w+|[a-z]+ the [a-z]+", call["task"]) for call in calls if "task" in call)
    assert all(re.fullmatch(r"[a-z ]+", call[key]) for call in calls for key in {"label", "room", "item"} & call.keys())
