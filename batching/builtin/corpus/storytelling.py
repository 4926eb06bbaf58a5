"""Asking for stories in chat: the request fixes what the story must contain."""

from random import Random

from .exchange import Exchange
from .stories import ANIMALS, HEROES, PLACES, TRAITS, story

_ASK = (
    "Tell me {kind} about {who}.",
    "Write {kind} about {who}.",
    "Can you tell me {kind} about {who}?",
    "Please tell me {kind} about {who}.",
    "I would like {kind} about {who}.",
)


def storytelling(rng: Random, events: int | None = None) -> Exchange:
    """`expected` lists the wanted slots as "slot=value" lines (none for a free request)."""
    wanted = {"animal": rng.choice(ANIMALS)}
    who = f"a {wanted['animal']}"
    if rng.random() < 0.3:
        wanted["trait"] = rng.choice(TRAITS)
        who = f"a {wanted['trait']} {wanted['animal']}"
    if rng.random() < 0.3:
        wanted["name"] = rng.choice(HEROES)
        who += f" named {wanted['name']}"
    if rng.random() < 0.3:
        wanted["place"] = rng.choice(PLACES)
        who += f" in {wanted['place']}"
    if events is None:
        events = rng.choice((0, 1, 1, 2, 3))
    kind = "a long story" if events > 6 else rng.choice(("a story", "a short story"))
    question = rng.choice(_ASK).format(kind=kind, who=who)
    expected = "\n".join(f"{slot}={value}" for slot, value in wanted.items())
    return Exchange("stories", question, story(rng, events, **wanted), expected, question)
