"""Two tasks that the model has never seen: a sentence goes in, one line in an invented convention comes out."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

FIRST = [
    "Anna",
    "Boris",
    "Clara",
    "David",
    "Elena",
    "Felix",
    "Greta",
    "Hugo",
    "Irene",
    "Jonas",
    "Karla",
    "Leon",
    "Maria",
    "Nils",
    "Olga",
    "Peter",
]
LAST = [
    "Adler",
    "Brandt",
    "Costa",
    "Duval",
    "Engel",
    "Fischer",
    "Garcia",
    "Holm",
    "Ivanov",
    "Jensen",
    "Keller",
    "Lopez",
    "Moreau",
    "Novak",
    "Olsen",
    "Petrov",
]
CITY = [
    "Lisbon",
    "Oslo",
    "Vienna",
    "Madrid",
    "Prague",
    "Dublin",
    "Athens",
    "Warsaw",
    "Helsinki",
    "Zurich",
    "Lyon",
    "Turin",
    "Porto",
    "Bergen",
]
JOB = [
    "baker",
    "nurse",
    "pilot",
    "teacher",
    "farmer",
    "painter",
    "lawyer",
    "cook",
    "tailor",
    "plumber",
    "singer",
    "dentist",
]

UNITS = (("km", "m", 1000), ("kg", "g", 1000), ("m", "cm", 100), ("l", "ml", 1000), ("h", "min", 60), ("min", "s", 60))


@dataclass(frozen=True)
class Example:
    """One pair."""

    prompt: str
    response: str


def person(rng: random.Random) -> Example:
    """A sentence about a person becomes JSON: cities in capitals, two-letter keys, "Last, First"."""
    first, last, city, job = (rng.choice(words) for words in (FIRST, LAST, CITY, JOB))
    age = rng.randint(21, 79)
    form = rng.choice(
        (
            "{first} {last} is {age} years old, lives in {city} and works as a {job}.",
            "The {job} {first} {last} from {city} turned {age}.",
            "At {age}, {first} {last} is a {job} in {city}.",
        )
    )
    text = form.format(first=first, last=last, age=age, city=city, job=job)
    line = f'{{"nm": "{last}, {first}", "ag": {age}, "ct": "{city.upper()}", "jb": "{job}"}}'
    return Example(f"Record: {text}", line)


def units(rng: random.Random) -> Example:
    """A quantity is converted, and written between bars, the number first."""
    large, small, factor = rng.choice(UNITS)
    number = rng.randint(2, 40)
    text = rng.choice(("Convert {n} {a} to {b}.", "How many {b} are {n} {a}?", "{n} {a} in {b}?"))
    return Example(text.format(n=number, a=large, b=small), f"|{number * factor}|{small}|<{number}{large}>")


TASKS: dict[str, Callable[[random.Random], Example]] = {"person": person, "units": units}
"""By name."""


def examples(task: str, count: int, seed: int) -> list[Example]:
    """Draw different examples."""
    rng, found = random.Random(seed), {}
    while len(found) < count:
        example = TASKS[task](rng)
        found[example.prompt] = example
    return list(found.values())
