"""Spelling, reversing and repeating words."""

from random import Random

from .exchange import Exchange

_LIST = (
    "apple arm autumn baby bag ball banana basket bath beach bear bed bee bell bench bike bird "
    "blanket boat book boot bottle bowl box boy brain branch bread brick bridge broom brother "
    "brush bucket bus bush butter button cake camel camera candle candy car card carpet carrot "
    "castle cat chair cheese cherry chicken child church circle city clock cloud coat coffee "
    "coin cold corn cow crab cream crown cup curtain dance day deer desk dinner dog door dragon "
    "dream dress drum duck eagle ear earth egg engine evening eye face family farm father "
    "feather field finger fire fish flag floor flower fly food foot forest fork fox friend frog "
    "fruit game garden gate gift girl glass glove goat gold grape grass green hair hammer hand "
    "happy hat heart hen hill honey horse hotel house ice island jacket jar jelly juice key "
    "king kitchen kite kitten knee knife ladder lake lamp leaf leg lemon letter library light "
    "lion lunch map market melon milk mirror money monkey moon morning mother mountain mouse "
    "mouth music nail name neck nest night nose nut ocean onion orange oven owl page paint "
    "panda paper parrot party peach pear pen pencil penguin pepper phone piano picture pig "
    "pillow pilot planet plant plate pocket pond potato prince pumpkin puppy queen rabbit rain "
    "rainbow red ribbon rice ring river road robot rock roof room root rope rose ruler salt "
    "sand school sea seed sheep shell ship shirt shoe shop silver sister sky snail snow soap "
    "sock soup spider spoon spring square star stone storm street sugar summer sun swan table "
    "tail tea teacher tent tiger time toast tomato tooth towel tower toy train tree truck "
    "tulip turtle uncle valley violin wall watch water whale wheel wind window winter wolf "
    "wood wool world yellow zebra"
)
WORDS: tuple[str, ...] = tuple(_LIST.split())

_SPELL = (
    'Spell the word "{w}".',
    "Spell {w}.",
    'How do you spell "{w}"?',
    "How do you spell {w}?",
    "Please spell {w} for me.",
    'Can you spell "{w}"?',
    "Spell out {w}.",
    'What are the letters of "{w}"?',
)
_REVERSE = (
    'Reverse the word "{w}".',
    "Reverse {w}.",
    'What is "{w}" backwards?',
    "Write {w} backwards.",
    "How do you write {w} backwards?",
    'Turn the word "{w}" around.',
    "Please reverse the word {w}.",
    'Spell "{w}" backwards.',
)
_REPEAT = (
    "Repeat after me: {w}",
    "Say this again: {w}",
    "Repeat these words: {w}",
    "Please repeat: {w}",
)


def spelling(rng: Random) -> Exchange:
    word = rng.choice(WORDS)
    question = rng.choice(_SPELL).format(w=word)
    result = "-".join(word)
    return Exchange("spelling", question, f"{word}: {result}.", result, question)


def reversing(rng: Random) -> Exchange:
    """The answer spells the word first: the reversal is then a copy, not a feat of memory."""
    word = rng.choice(WORDS)
    question = rng.choice(_REVERSE).format(w=word)
    result = "-".join(reversed(word))
    answer = f"{word} is spelled {'-'.join(word)}. Backwards it is {result}."
    return Exchange("reversing", question, answer, result, question)


def repeating(rng: Random) -> Exchange:
    text = " ".join(rng.choices(WORDS, k=rng.randint(2, 12)))
    question = rng.choice(_REPEAT).format(w=text)
    return Exchange("repeating", question, text, text, text)
