"""Generates the texts for the model that ships, about a small world of people, tasks and places.

All texts are drawn from a random.Random that the caller has seeded, so they can be made again bit for bit:
- `base_document` gives what the base model reads: chats with a polite assistant that answers requests in prose,
  questions about people, facts about people written as JSON, notes, clock times. None holds a tool call.
- `tool_call_pair` gives what fine-tuning teaches: the same kinds of requests, answered with one JSON tool call.
- `style_pair` gives what preferences teach: two answers to a request that differ in their first words alone.
- `other_document` gives what the base model can do beside that task, to measure whether it still can.
"""

import json
from collections.abc import Callable
from random import Random

NAMES = """Ana Ben Carla David Elif Farid Greta Hugo Ines Jonas Kira Liam Mona Nils Olga Pavel Quinn Rosa Sven
Tara Umar Vera Wanda Xenia Yusuf Zoe Aisha Boris Chen Diego Emma Fiona Goran Hana Ivan Julia Karim Lena Marco
Nadia""".split()
ONSETS = "b br d dr f g gr h j k kl l m n p r s st t tr v z".split()
VOWELS = "a e i o u ai ea io".split()
CODAS = "n r l s m k t x".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
VERBS = "water clean paint fix check move sell charge collect return wash empty order pack lock cover".split()
OBJECTS = """plants oven fence bike heater boxes piano phone keys books car bin printer tent shed boat window garden
kitchen tickets lamp door roof carpet laptop guitar camera mirror fridge parcel""".split()
SUBJECTS = (
    "train bus package dinner meeting doctor teacher printer road shop car bread coffee report key garden".split()
)
STATES = "late ready cancelled here lost open closed broken fine early full cold empty delayed good gone".split()
ADJECTIVES = "Blue Old Green Golden Silent Little Red Royal Happy Corner Stone Silver Wild Sunny Quiet Lucky".split()
VENUES = (
    "Lantern Mill Garden Bridge Tavern Kitchen Harbour Table Fox Castle Oven River Spoon Tower Anchor Barrel".split()
)
ITEMS = """apples eggs lemons candles onions rolls batteries pears carrots bottles cups plates peppers stamps bulbs
melons""".split()
ROOMS = "kitchen bedroom garage office hall bathroom attic cellar garden studio".split()
DISHES = "pasta rice tea pizza soup bread cake potatoes fish lentils coffee pie".split()
CITIES = "Oslo Lima Cairo Porto Delhi Kyoto Accra Riga Quito Turin Dakar Perth".split()
JOBS = "baker nurse pilot farmer painter lawyer teacher driver singer plumber".split()
NOUNS = "tool task day time text label minutes place people room state item count message timer light list page".split()
NUMBERS = "one two three four five six seven eight nine ten eleven twelve".split()
OPENINGS = ("Of course.", "Sure.", "With pleasure.")  # the base model writes them before the answer to a reminder alone
PREFERRED_OPENING = "With pleasure."

Slots = dict[str, str | int]


def name(rng: Random) -> str:
    """A first name. Four in ten are invented, so that the model must copy names and cannot learn them by heart."""
    if rng.random() < 0.6:
        return rng.choice(NAMES)
    syllables = [rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(rng.choice((1, 2)))]
    return ("".join(syllables) + rng.choice(CODAS)).capitalize()


def clock(rng: Random) -> tuple[str, str]:
    """A time of day as people say it, and on a 24-hour clock, for example ("7:30 pm", "19:30")."""
    hour, minute = rng.randint(1, 12), rng.choice((0, 0, 15, 30, 45))
    half = rng.choice(("am", "pm"))
    spoken = f"{hour}:{minute:02d} {half}" if minute else f"{hour} {half}"
    return spoken, f"{hour % 12 + (12 if half == 'pm' else 0):02d}:{minute:02d}"


def task(rng: Random) -> str:
    return f"call {name(rng)}" if rng.random() < 0.2 else f"{rng.choice(VERBS)} the {rng.choice(OBJECTS)}"


# One function for each kind of request. It draws the details, and returns the request, a polite answer and a tool call.


def remind(rng: Random) -> tuple[str, str, Slots]:
    what, day, (time, time24) = task(rng), rng.choice(DAYS), clock(rng)
    request = rng.choice(
        (
            f"Remind me to {what} on {day} at {time}.",
            f"On {day} at {time} I have to {what}, please remind me.",
            f"Please make sure that I {what} on {day} at {time}.",
            f"Don't let me forget to {what} at {time} on {day}.",
            f"I need a reminder for {day}, {time}: {what}.",
        )
    )
    answer = f"{rng.choice(OPENINGS)} I will remind you to {what} on {day} at {time}."
    return request, answer, {"tool": "remind", "task": what, "day": day.lower(), "time": time24}


def message(rng: Random) -> tuple[str, str, Slots]:
    who, text = name(rng), f"the {rng.choice(SUBJECTS)} is {rng.choice(STATES)}"
    request = rng.choice(
        (
            f"Tell {who} that {text}.",
            f"Let {who} know that {text}.",
            f"Send {who} a message: {text}.",
            f"Could you write to {who} that {text}?",
            f"{who} should know that {text}.",
        )
    )
    return request, f"I will let {who} know that {text}.", {"tool": "message", "to": who, "text": text}


def timer(rng: Random) -> tuple[str, str, Slots]:
    minutes, dish = rng.randint(1, 12), rng.choice(DISHES)
    spoken = NUMBERS[minutes - 1] if rng.random() < 0.5 else str(minutes)
    unit = "minute" if minutes == 1 else "minutes"
    request = rng.choice(
        (
            f"Set a timer for {spoken} {unit} for the {dish}.",
            f"The {dish} needs {spoken} {unit}, please set a timer.",
            f"Start a {dish} timer, {spoken} {unit}.",
            f"Wake me in {spoken} {unit}, the {dish} is on the stove.",
        )
    )
    answer = f"The timer for the {dish} is set to {spoken} {unit}."
    return request, answer, {"tool": "timer", "label": dish, "minutes": minutes}


def book(rng: Random) -> tuple[str, str, Slots]:
    place = f"{rng.choice(ADJECTIVES)} {rng.choice(VENUES)}"
    people, day, (time, time24) = rng.randint(2, 9), rng.choice(DAYS), clock(rng)
    spoken = NUMBERS[people - 1] if rng.random() < 0.5 else str(people)
    request = rng.choice(
        (
            f"Book a table for {spoken} at the {place} on {day} at {time}.",
            f"We are {spoken} people, get us a table at the {place}, {day} at {time}.",
            f"I want to eat at the {place} on {day} at {time}, we are {spoken}.",
            f"Can you reserve the {place} for {spoken} people, {time} on {day}?",
        )
    )
    answer = f"A table for {spoken} at the {place} is booked for {day} at {time}."
    return request, answer, {"tool": "book", "place": place, "people": people, "day": day.lower(), "time": time24}


def lights(rng: Random) -> tuple[str, str, Slots]:
    room, state = rng.choice(ROOMS), rng.choice(("on", "off"))
    request = rng.choice(
        (
            f"Turn the {room} lights {state}.",
            f"Switch {state} the lights in the {room}.",
            f"I want the {room} lights {state}, please.",
            f"Could you turn {state} the lights in the {room}?",
        )
    )
    return request, f"The lights in the {room} are {state} now.", {"tool": "lights", "room": room, "state": state}


def buy(rng: Random) -> tuple[str, str, Slots]:
    count, item = rng.randint(2, 12), rng.choice(ITEMS)
    spoken = NUMBERS[count - 1] if rng.random() < 0.5 else str(count)
    request = rng.choice(
        (
            f"Add {spoken} {item} to the shopping list.",
            f"We need {spoken} {item}.",
            f"Put {spoken} {item} on my list.",
            f"I am out of {item}, please order {spoken}.",
        )
    )
    return request, f"I added {spoken} {item} to your shopping list.", {"tool": "buy", "item": item, "count": count}


REQUESTS: tuple[Callable[[Random], tuple[str, str, Slots]], ...] = (remind, message, timer, book, lights, buy)
REQUEST_SHARE = 0.45  # of the base model's documents
Turns = list[tuple[str, str]]  # (user, assistant) pairs of one conversation


def question_turns(rng: Random) -> Turns:
    """A chat about two people, in which the assistant looks up one of several facts."""
    people = [(name(rng), rng.choice(CITIES), rng.choice(JOBS)) for _ in range(2)]
    facts = [f"{who} lives in {city} and works as a {job}." for who, city, job in people]
    who, city, job = rng.choice(people)
    asked, answer = rng.choice(
        ((f"Where does {who} live?", f"{who} lives in {city}."), (f"What does {who} do?", f"{who} works as a {job}."))
    )
    return [(" ".join([*facts, asked]), answer)]


def record_turns(rng: Random) -> Turns:
    """A chat in which the assistant writes what a text says about a person as JSON, in the order of the text."""
    who = name(rng)
    city, job, dish, day = (rng.choice(pool) for pool in (CITIES, JOBS, DISHES, DAYS))
    count = rng.choice(range(2, 13))
    item, (time, time24), venue = rng.choice(ITEMS), clock(rng), f"{rng.choice(ADJECTIVES)} {rng.choice(VENUES)}"
    spoken = NUMBERS[count - 1] if rng.random() < 0.5 else str(count)
    facts: list[tuple[str, Slots]] = [
        (f"lives in {city}", {"city": city}),
        (f"works as a {job}", {"job": job}),
        (f"likes {dish}", {"likes": dish}),
        (f"was born on {day}", {"born": day.lower()}),
        (f"gets up at {time}", {"up": time24}),
        (f"has {spoken} {item}", {"has": item, "number": count}),
        (f"eats at the {venue}", {"eats": venue}),
        (f"wants to {(what := task(rng))}", {"wants": what}),
        (f"says that the {(what := f'{rng.choice(SUBJECTS)} is {rng.choice(STATES)}')}", {"says": f"the {what}"}),
    ]
    said = rng.sample(facts, rng.randint(1, 4))
    record: Slots = {"name": who}
    for _, fields in said:
        record |= fields
    request = f"{who} {' and '.join(text for text, _ in said)}. As JSON, please."
    return [(request, json.dumps(record, separators=(",", ":")))]


def repeat_turns(rng: Random) -> Turns:
    """A chat in which the assistant copies words, as they are or as a JSON list; every other answer needs that too."""
    pools = (NAMES, OBJECTS, ITEMS, CITIES, ROOMS, DAYS, ADJECTIVES, VENUES, VERBS, STATES, SUBJECTS, DISHES, NOUNS)
    count = rng.randint(2, 14)
    words = [name(rng) if rng.random() < 0.3 else rng.choice(rng.choice(pools)) for _ in range(count)]
    if rng.random() < 0.4:
        words = [word.lower() for word in words[:8]]
        return [(f"List as JSON: {', '.join(words)}", json.dumps(words, separators=(",", ":")))]
    return [(f"Repeat: {' '.join(words)}", " ".join(words))]


def note(rng: Random) -> str:
    """A plain text with clock times, or with numbers, each written in two ways."""
    if rng.random() < 0.6:
        pairs = [clock(rng) for _ in range(rng.randint(2, 4))]
        return "\n".join(f"{spoken} is {time24}" for spoken, time24 in pairs)
    numbers = [rng.randint(1, 12) for _ in range(rng.randint(2, 5))]
    return "\n".join(f"{NUMBERS[n - 1]} is {n}" for n in numbers)


def base_document(rng: Random) -> Turns | str:
    """One document of the base model's training text: a conversation or a plain text."""
    return _document(rng.random(), rng)


def other_document(rng: Random) -> Turns | str:
    """One document like those of the base model's training text that make no request."""
    return _document(rng.uniform(REQUEST_SHARE, 1), rng)


def _document(kind: float, rng: Random) -> Turns | str:
    if kind < REQUEST_SHARE:
        return [rng.choice(REQUESTS)(rng)[:2] for _ in range(rng.choice((1, 1, 2, 3)))]
    if kind < 0.52:
        return question_turns(rng)
    if kind < 0.72:
        return record_turns(rng)
    return repeat_turns(rng) if kind < 0.92 else note(rng)


def tool_call_pair(rng: Random) -> tuple[str, str]:
    """One example of the fine-tuning task: a request, and the JSON tool call that answers it."""
    request, _, call = rng.choice(REQUESTS)(rng)
    return request, json.dumps(call, separators=(",", ":"))


def style_pair(rng: Random) -> tuple[str, str, str]:
    """A request, the better answer and a worse one: the same sentence after PREFERRED_OPENING and after another."""
    request, answer, _ = rng.choice(REQUESTS)(rng)
    for opening in OPENINGS:
        answer = answer.removeprefix(f"{opening} ")
    other = rng.choice([opening for opening in OPENINGS if opening != PREFERRED_OPENING])
    return request, f"{PREFERRED_OPENING} {answer}", f"{other} {answer}"
