"""What comes before and after, and putting numbers in order."""

from random import Random

from .exchange import Exchange

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August",
          "September", "October", "November", "December")  # fmt: skip

_AFTER = (
    "Which {noun} comes after {x}?",
    "What {noun} comes after {x}?",
    "What is the {noun} after {x}?",
    "Name the {noun} after {x}.",
    "Which {noun} follows {x}?",
    "Tell me the {noun} that comes after {x}.",
)
_BEFORE = (
    "Which {noun} comes before {x}?",
    "What {noun} comes before {x}?",
    "What is the {noun} before {x}?",
    "Name the {noun} before {x}.",
    "Which {noun} is just before {x}?",
    "Tell me the {noun} that comes before {x}.",
)
_SORT_UP = (
    "Sort these numbers: {x}.",
    "Put these numbers in order: {x}.",
    "Order these numbers from smallest to largest: {x}.",
    "Sort {x} in ascending order.",
)
_SORT_DOWN = (
    "Order these numbers from largest to smallest: {x}.",
    "Sort {x} in descending order.",
)
_LARGEST = ("Which number is larger, {a} or {b}?", "What is larger: {a} or {b}?",
            "Which is greater, {a} or {b}?")  # fmt: skip
_SMALLEST = ("Which number is smaller, {a} or {b}?", "What is smaller: {a} or {b}?",
             "Which is less, {a} or {b}?")  # fmt: skip


def calendar(rng: Random) -> Exchange:
    noun, names = rng.choice((("day", DAYS), ("month", MONTHS), ("month", MONTHS)))
    i = rng.randrange(len(names))
    step, templates, word = rng.choice(((1, _AFTER, "after"), (-1, _BEFORE, "before")))
    question = rng.choice(templates).format(noun=noun, x=names[i])
    result = names[(i + step) % len(names)]
    answer = f"The {noun} {word} {names[i]} is {result}."
    return Exchange("calendar", question, answer, result, question)


def sorting(rng: Random) -> Exchange:
    numbers = rng.sample(range(100), rng.randint(3, 5))
    down = rng.random() < 0.3
    shown = ", ".join(map(str, numbers))
    question = rng.choice(_SORT_DOWN if down else _SORT_UP).format(x=shown)
    result = ", ".join(map(str, sorted(numbers, reverse=down)))
    return Exchange("sorting", question, f"{result}.", result, shown)


def comparing(rng: Random) -> Exchange:
    a, b = rng.sample(range(100), 2)
    larger = rng.random() < 0.5
    question = rng.choice(_LARGEST if larger else _SMALLEST).format(a=a, b=b)
    result, word = (max(a, b), "larger") if larger else (min(a, b), "smaller")
    key = f"{min(a, b)},{max(a, b)}"
    return Exchange("comparing", question, f"{result} is {word}.", str(result), key)
