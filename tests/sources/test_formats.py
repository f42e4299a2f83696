"""Which keys of a row are read: by the formats' names, or by names that a recipe gives."""

import pytest

from common.conversations.conversation import Conversation, Message
from common.conversations.row_reader import RowReader
from common.sources.formats import FORMATS, match_keys
from common.sources.source_row import BadRow

HELLO = Conversation((Message("user", "Hello"), Message("assistant", "Hi")))
GERMAN = {"user": "frage", "assistant": "antwort"}


@pytest.mark.parametrize("known", FORMATS, ids=lambda known: known.name)
def test_what_a_format_hands_on_is_matched_in_the_same_way(known):
    """Readers of tables give only the columns that are matched, under the names that they are matched by."""
    names = ("id", *(f" {key.upper()}" for key in known.keys), "Tools", "weight", "label", "images")
    matched = match_keys(names)
    assert matched.format_name == known.name and set(known.keys) <= matched.places.keys()
    again = match_keys(tuple(matched.places))
    assert (again.format_name, set(again.fields)) == (matched.format_name, set(matched.fields))


@pytest.mark.parametrize("columns", [GERMAN, GERMAN | {"system": "rolle"}, {"messages": "antwort"}, {"text": "frage"}])
@pytest.mark.parametrize("names", [("id", "frage", "antwort", "rolle"), ("Antwort", " FRAGE", "rolle", "user", "text")])
def test_what_named_columns_hand_on_is_matched_in_the_same_way(names, columns):
    matched = match_keys(names, columns)
    again = match_keys(tuple(matched.places), columns)
    assert (again.format_name, set(again.fields)) == (matched.format_name, set(matched.fields))


def test_rivals_are_handed_on_for_what_they_say():
    matched = match_keys(("messages", "question", "answer", "note"))
    assert set(matched.places) == {"messages", "question", "answer"}
    assert set(matched.fields) == {"messages"}
    assert [name for name, _ in matched.unread] == ["question", "answer", "note"]


@pytest.mark.parametrize(
    ("columns", "row", "expected"),
    [
        (GERMAN, {"frage": "Hello", "antwort": "Hi"}, HELLO),
        (GERMAN, {"Frage ": "Hello", "ANTWORT": "Hi", "id": 1}, HELLO),
        (GERMAN, {"frage": "Hello", "antwort": "Hi", "question": "a", "answer": "b"}, HELLO),
        (GERMAN, {"frage": "Hello", "antwort": "Hi", "user": "u17", "assistant": "a3"}, HELLO),
        ({"user": "assistant", "assistant": "user"}, {"user": "Hi", "assistant": "Hello"}, HELLO),
        ({"user": "prompt", "assistant": "completion"}, {"prompt": "Hello", "completion": "Hi", "messages": []}, HELLO),
        (
            {"messages": "dialog"},
            {"dialog": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]},
            HELLO,
        ),
        (
            {"messages": "messages"},
            {"messages": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}], "text": "x"},
            HELLO,
        ),
        ({"text": "body"}, {"body": "Once", "messages": []}, "Once"),
        ({"text": "text"}, {"text": "Once", "instruction": "a", "output": "b"}, "Once"),
    ],
)
def test_columns_that_a_recipe_names_are_read(columns, row, expected):
    assert RowReader(columns=columns).read(row) == expected


def test_columns_can_name_all_that_goes_with_the_two_sides():
    columns = GERMAN | {"system": "rolle", "tools": "werkzeug", "reasoning": "gedanke"}
    row = {"frage": "Hello", "antwort": "Hi", "rolle": "S", "werkzeug": '[{"name": "f"}]', "gedanke": "Hm."}
    assert RowReader(columns=columns).read(row) == Conversation(
        (Message("system", "S"), Message("user", "Hello"), Message("assistant", "Hi", reasoning="Hm.")),
        ({"type": "function", "function": {"name": "f"}},),
    )


def test_what_is_not_named_is_used_as_always_or_counted():
    reader = RowReader(columns=GERMAN)
    row = {"frage": "Hello", "antwort": "Hi", "system": "S", "history": [["a", "b"]], "user": "u17", "topic": "x"}
    assert [m.content for m in reader.read(row).messages] == ["S", "a", "b", "Hello", "Hi"]
    assert reader.unread == {"user": 1, "topic": 1}


def test_a_column_that_was_named_for_one_thing_is_not_read_as_another():
    reader = RowReader(columns={"user": "system", "assistant": "weight"})
    assert reader.read({"system": "Hello", "weight": "Hi"}) == HELLO


def test_a_judges_reasoning_beside_a_pair_is_not_taken_for_thoughts():
    reader = RowReader()
    assert reader.read({"question": "Hello", "answer": "Hi", "reasoning": "The answer is polite."}) == HELLO
    assert reader.unread == {"reasoning": 1}


def test_a_column_that_is_missing_is_named_with_those_that_are_there():
    with pytest.raises(BadRow, match="it has no 'antwort', which .* names, but 'frage', 'reply'"):
        RowReader(columns=GERMAN).read({"frage": "a", "reply": "b"})


def test_a_column_that_two_names_could_mean_is_refused():
    with pytest.raises(BadRow, match="2 keys could be 'frage'"):
        RowReader(columns=GERMAN).read({"Frage": "a", "FRAGE": "b", "antwort": "c"})


def test_a_label_is_a_preference_also_beside_named_columns():
    with pytest.raises(BadRow, match="preference data"):
        RowReader(columns=GERMAN).read({"frage": "a", "antwort": "b", "label": False})
