"""Short stories from a grammar, and the recogniser for that same grammar.

    story   = opening liking? "\\n\\n" problem event* meeting "\\n\\n" solution ending

Each section is one of its templates. Slots such as {name} are bound once for the whole story
(hero, friend, place, object), so a story in which the hero changes name does not parse;
{day}, {sight} and {food} are local to one event. Pronouns follow from the hero's name.
"""

import re
from random import Random


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_GENDERS = {
    "she": _words(
        "Mia Lily Anna Zoë Emma Ruby Clara Nora Ella Ivy Rosa Luna Maya Alice Hazel Chloé Sara "
        "Tilda Wanda Greta"
    ),
    "he": _words(
        "Tom Max Ben Leo Sam Oscar Finn Hugo Jack Felix Otto Noah Paul Theo Milo José Björn Karl "
        "Rufus Victor"
    ),
}
HEROES: tuple[str, ...] = tuple(name for names in _GENDERS.values() for name in names)
FRIENDS = _words(
    "Pip Dot Bramble Biscuit Clover Pepper Willow Ziggy Mango Pebble Nutmeg Poppy Tango Waffle "
    "Button Cricket"
)
ANIMALS = _words(
    "fox bear rabbit mouse cat dog wolf hedgehog squirrel badger frog duck owl deer lion tiger "
    "panda monkey goat turtle penguin horse pig mole beaver dragon robot raccoon sheep hen"
)
TRAITS = _words(
    "little brave clever curious kind shy happy lazy gentle proud quiet silly cheerful tiny "
    "hungry young"
)
PLACES = ("the forest", "a small village", "the mountains", "a quiet valley", "a big city",
          "the garden", "a castle", "a house by the sea", "the desert", "a green meadow",
          "a cave", "a tall tree", "an old mill", "a snowy land", "a busy harbour")  # fmt: skip
OBJECTS = ("red kite", "golden key", "silver bell", "blue hat", "wooden boat", "shiny coin",
           "magic lamp", "yellow scarf", "music box", "small drum", "round mirror", "big map",
           "green lantern", "paper crown", "warm blanket", "honey jar")  # fmt: skip
FOODS = ("apples", "honey", "bread", "soup", "berries", "nuts", "cheese", "pancakes", "pears",
         "carrots", "cookies", "crêpes")  # fmt: skip
HOBBIES = ("sing", "dance", "climb", "swim", "read", "paint", "run", "play hide and seek",
           "look at the stars", "jump over puddles", "tell jokes", "collect stones")  # fmt: skip
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
SIGHTS = ("a bridge", "a river", "an old well", "a windmill", "a deep hole", "a quiet pond",
          "a broken cart", "a field of flowers", "a narrow path", "a dark tunnel", "a fence",
          "a tall tower", "a waterfall", "a pile of leaves")  # fmt: skip
WEATHER = ("sunny", "rainy", "windy", "cold", "foggy", "warm", "snowy", "cloudy")

_SLOTS: dict[str, tuple[str, ...]] = {
    "name": HEROES, "friend": FRIENDS, "animal": ANIMALS, "animal2": ANIMALS, "trait": TRAITS,
    "trait2": TRAITS, "place": PLACES, "object": OBJECTS, "food": FOODS, "hobby": HOBBIES,
    "day": DAYS, "sight": SIGHTS, "weather": WEATHER,
}  # fmt: skip
_LOCAL = ("day", "sight", "food", "weather")
_FORMS = {
    "she": {"he": "she", "He": "She", "his": "her", "His": "Her", "him": "her"},
    "he": {"he": "he", "He": "He", "his": "his", "His": "His", "him": "him"},
}

_PRONOUNS = {name: _FORMS[gender] for gender, names in _GENDERS.items() for name in names}

OPENING = (
    "Once upon a time, there was a {trait} {animal} named {name}. {name} lived in {place}.",
    "Once upon a time, in {place}, there lived a {trait} {animal} called {name}.",
    "Once upon a time, a {trait} {animal} named {name} lived in {place}.",
    "Long ago, in {place}, there was a {trait} {animal} whose name was {name}.",
)
LIKING = (
    "{name} liked to {hobby}.",
    "Every day, {he} liked to {hobby}.",
    "More than anything, {name} loved to {hobby}.",
)
PROBLEM = (
    "One {weather} day, {name} lost {his} {object}. {He} was very sad.",
    "One {weather} morning, {his} {object} was gone. {name} looked everywhere.",
    "One {weather} evening, the wind took {his} {object} away. {name} began to cry.",
)
EVENT = (
    "On {day}, {name} walked to {sight}, but the {object} was not there.",
    "{He} looked behind {sight} and found only some {food}.",
    "Then {he} came to {sight}. {name} was tired and ate some {food}.",
    "On {day} it was {weather}, so {name} slept near {sight}.",
    "{name} asked everyone near {sight}, but nobody had seen the {object}.",
)
MEETING = (
    "Then {name} met a {trait2} {animal2} named {friend}. \"Can you help me?\" asked {name}.",
    "Soon a {trait2} {animal2} called {friend} came by. \"What is wrong?\" asked {friend}.",
    "Near {sight}, {he} saw a {trait2} {animal2}. \"I am {friend},\" said the {animal2}.",
)  # fmt: skip
SOLUTION = (
    "{friend} helped {him} look, and together they found the {object} under {sight}.",
    "\"Follow me,\" said {friend}. They went to {sight}, and there was the {object}!",
    "{friend} had found the {object} near {sight} and gave it back to {name}.",
)  # fmt: skip
ENDING = (
    "{name} was so happy that {he} shared {his} {food} with {friend}. They became good friends.",
    "{name} thanked {friend}, and they ate {food} together. The end.",
    "From that day on, {name} and {friend} liked to {hobby} together in {place}.",
    "{name} went home and was never sad again. The end.",
)


def _bind(rng: Random, wanted: dict[str, str]) -> dict[str, str]:
    values = {slot: rng.choice(options) for slot, options in _SLOTS.items()} | wanted
    return values | _PRONOUNS[values["name"]]


def story(rng: Random, events: int = 1, **wanted: str) -> str:
    """A story with `events` search scenes; `wanted` fixes slots, such as animal="fox"."""
    values = _bind(rng, wanted)

    def write(templates: tuple[str, ...]) -> str:
        fresh = {slot: rng.choice(_SLOTS[slot]) for slot in _LOCAL}
        return rng.choice(templates).format(**values | fresh)

    first = write(OPENING)
    if rng.random() < 0.7:
        first += " " + write(LIKING)
    second = [write(PROBLEM), *(write(EVENT) for _ in range(events)), write(MEETING)]
    last = [write(SOLUTION), write(ENDING)]
    return "\n\n".join((first, " ".join(second), " ".join(last)))


def _pattern(template: str, bound: dict[str, str]) -> re.Pattern[str]:
    seen: set[str] = set()
    parts: list[str] = []
    for literal, slot in re.findall(r"([^{]*)(?:\{(\w+)\})?", template):
        parts.append(re.escape(literal))
        if not slot:
            continue
        if slot in bound:
            parts.append(re.escape(bound[slot]))
        elif slot in seen:
            parts.append(f"(?P={slot})")
        else:
            seen.add(slot)
            options = sorted(_SLOTS[slot], key=len, reverse=True)
            parts.append(f"(?P<{slot}>{'|'.join(map(re.escape, options))})")
    return re.compile("".join(parts))


_State = tuple[int, dict[str, str]]


def _match(
    text: str, states: list[_State], before: str, templates: tuple[str, ...]
) -> list[_State]:
    """Every way on from `states` by `before` and one of `templates`, with its new bindings."""
    found: list[_State] = []
    for position, bound in states:
        if not text.startswith(before, position):
            continue
        for template in templates:
            match = _pattern(template, bound).match(text, position + len(before))
            if match:
                new = {k: v for k, v in match.groupdict().items() if k not in _LOCAL}
                if "name" in new:
                    new |= _PRONOUNS[new["name"]]
                found.append((match.end(), bound | new))
    return found


def bindings(text: str) -> dict[str, str] | None:
    """The slots of a whole story (hero, place, object …), or None where it does not parse."""
    states = _match(text, [(0, {})], "", OPENING)
    states += _match(text, states, " ", LIKING)
    states = _match(text, states, "\n\n", PROBLEM)
    searching = states
    while searching:
        searching = _match(text, searching, " ", EVENT)
        states = states + searching
    states = _match(text, states, " ", MEETING)
    states = _match(text, states, "\n\n", SOLUTION)
    states = _match(text, states, " ", ENDING)
    return next((bound for end, bound in states if end == len(text)), None)


def parses(text: str) -> bool:
    """True if the grammar above generates exactly `text`."""
    return bindings(text) is not None
