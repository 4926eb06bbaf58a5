"""The training mixture: an endless, seeded stream of documents.

A document is a list of spans (text, learned). Chats are several exchanges in a row; sheets,
stories and tool conversations stand alone. No held-out exchange is ever drawn.
"""

from collections.abc import Iterator
from random import Random

from . import arithmetic, extraction, geography, ordering, smalltalk, storytelling, units, words
from .chatml import END_OF_TEXT, Message, Span, render
from .exchange import Exchange, Family, draw
from .stories import story
from .toolcalls import CATALOGUE, conversation, definitions

FAMILIES: dict[str, tuple[Family, int]] = {
    "addition": (arithmetic.addition, 18),
    "subtraction": (arithmetic.subtraction, 12),
    "multiplication": (arithmetic.multiplication, 5),
    "capitals": (geography.capitals, 10),
    "continents": (geography.continents, 5),
    "units": (units.units, 7),
    "calendar": (ordering.calendar, 4),
    "sorting": (ordering.sorting, 6),
    "comparing": (ordering.comparing, 4),
    "spelling": (words.spelling, 6),
    "reversing": (words.reversing, 7),
    "repeating": (words.repeating, 3),
    "extraction": (extraction.extraction, 9),
    "smalltalk": (smalltalk.smalltalk, 4),
    "emoji": (smalltalk.emoji, 3),
    "languages": (smalltalk.languages, 3),
}
"""kind -> (generator, how often it is drawn relative to the others)."""

_SYSTEM = (
    "You are a helpful assistant.",
    "You are Slipstream, a small helpful assistant.",
    "Answer briefly.",
    "You are a friendly assistant. Be concise.",
)
_GENERATORS = [family for family, _ in FAMILIES.values()]
_WEIGHTS = [weight for _, weight in FAMILIES.values()]


def exchanges(rng: Random, count: int) -> list[Exchange]:
    """`count` exchanges from the training side of the split."""
    return [draw(family, rng) for family in rng.choices(_GENERATORS, _WEIGHTS, k=count)]


def _messages(turns: list[Exchange]) -> list[Message]:
    messages: list[Message] = []
    for turn in turns:
        messages.append({"role": "user", "content": turn.question})
        messages.append({"role": "assistant", "content": turn.answer})
    return messages


def chat(rng: Random, turns: int) -> list[Span]:
    messages = _messages(exchanges(rng, turns))
    if rng.random() < 0.15:
        messages.insert(0, {"role": "system", "content": rng.choice(_SYSTEM)})
    return render(messages)


def story_chat(rng: Random, events: int | None = None) -> list[Span]:
    asked = draw(lambda r: storytelling.storytelling(r, events), rng)
    return render(_messages([asked]))


def plain_story(rng: Random, events: int) -> list[Span]:
    return [(story(rng, events), True)]


def sheet(rng: Random, lines: int) -> list[Span]:
    spans: list[Span] = []
    for question, answer in arithmetic.sheet(rng, lines):
        spans += [(question, False), (answer, True), ("\n", True)]
    return spans


def tool_chat(rng: Random) -> list[Span]:
    """Mostly a tool conversation; at times tools are offered and the question needs none."""
    if rng.random() < 0.15:
        tool = rng.choice(CATALOGUE)
        offered = definitions(rng, tool, rng.choice(tool.names))
        return render(_messages(exchanges(rng, 1)), offered)
    talk = conversation(rng)
    follow = _messages(exchanges(rng, 1)) if rng.random() < 0.2 else []
    return render(talk.messages + follow, talk.tools)


def _short(rng: Random) -> list[Span]:
    pick = rng.random()
    if pick < 0.58:
        return chat(rng, rng.choice((1, 1, 2, 3, 4)))
    if pick < 0.80:
        return sheet(rng, rng.randint(4, 20))
    if pick < 0.89:
        return tool_chat(rng)
    if pick < 0.95:
        return story_chat(rng)
    return plain_story(rng, rng.choice((0, 1, 1, 2, 3)))


def _long(rng: Random) -> list[Span]:
    pick = rng.random()
    if pick < 0.7:
        return chat(rng, rng.randint(10, 60))
    if pick < 0.85:
        return story_chat(rng, rng.randint(12, 50))
    return plain_story(rng, rng.randint(12, 50))


def documents(seed: int, *, long: bool = False) -> Iterator[list[Span]]:
    """Endless documents, each closed by the end-of-text token; `long` ones fill 2,048 tokens."""
    rng = Random(f"{seed}-{long}")
    while True:
        yield [*(_long(rng) if long else _short(rng)), (END_OF_TEXT, True)]
