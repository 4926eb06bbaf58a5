"""Extracting fields from a sentence as one line of JSON."""

import json
from random import Random

from .exchange import Exchange
from .geography import CAPITALS
from .stories import HEROES

_JOBS = ("teacher", "doctor", "farmer", "pilot", "painter", "baker", "nurse", "writer", "singer",
         "engineer", "gardener", "lawyer", "cook", "driver", "dentist")  # fmt: skip
_ITEMS = ("apples", "pears", "lemons", "books", "pencils", "shirts", "candles", "chairs",
          "lamps", "plates", "spoons", "tickets", "bottles", "cakes", "flowers")  # fmt: skip
_ASK = (
    "Extract the {fields} as JSON: {text}",
    "Return JSON with {fields}: {text}",
    "Give me the {fields} as JSON. {text}",
    "{text} Extract {fields} as JSON.",
    "{text}\nReturn the {fields} as JSON.",
)


def _person(rng: Random) -> tuple[str, dict[str, str | int]]:
    name, age = rng.choice(HEROES), rng.randint(18, 90)
    city, job = rng.choice(CAPITALS), rng.choice(_JOBS)
    text = rng.choice(
        (
            "{name} is {age} years old and lives in {city}.",
            "{name} is a {job} from {city}.",
            "{name}, {age}, works as a {job} in {city}.",
            "My name is {name}, I am {age} years old and I live in {city}.",
        )
    )
    return text, {"name": name, "age": age, "city": city, "job": job}


def _order(rng: Random) -> tuple[str, dict[str, str | int]]:
    name, item = rng.choice(HEROES), rng.choice(_ITEMS)
    count, price = rng.randint(2, 60), rng.randint(2, 99)
    text = rng.choice(
        (
            "{name} ordered {quantity} {item} for {price} euros.",
            "{name} bought {quantity} {item}.",
            "Please send {quantity} {item} to {name}. The price is {price} euros.",
        )
    )
    return text, {"name": name, "item": item, "quantity": count, "price": price}


def extraction(rng: Random) -> Exchange:
    """`expected` and the answer are the same JSON text, its keys in the order asked for."""
    template, values = rng.choice((_person, _order))(rng)
    fields = [field for field in values if f"{{{field}}}" in template]
    if len(fields) > 2 and rng.random() < 0.3:
        fields.remove(rng.choice(fields))
    rng.shuffle(fields)
    listed = ", ".join(fields[:-1]) + " and " + fields[-1]
    text = template.format(**values)
    question = rng.choice(_ASK).format(fields=listed, text=text)
    answer = json.dumps({field: values[field] for field in fields}, ensure_ascii=False)
    return Exchange("extraction", question, answer, answer, text)
