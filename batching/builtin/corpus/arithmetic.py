"""Two-digit addition and subtraction, one-digit multiplication."""

from random import Random

from .exchange import Exchange, is_held_out

_ASK = (
    "What is {q}?",
    "{q} = ?",
    "{q}",
    "Calculate {q}.",
    "Compute {q}",
    "How much is {q}?",
    "What's {q}?",
    "Can you tell me what {q} is?",
    "Please work out {q}.",
    "Solve {q}.",
)
_ADD_WORDS = (
    "Add {a} and {b}.",
    "What is the sum of {a} and {b}?",
    "What is {a} plus {b}?",
    "What do you get if you add {a} and {b}?",
)
_SUB_WORDS = (
    "Subtract {b} from {a}.",
    "What is {a} minus {b}?",
    "What is left if you take {b} from {a}?",
    "What is the difference between {a} and {b}?",
)
_MUL_WORDS = (
    "Multiply {a} by {b}.",
    "What is {a} times {b}?",
    "What is the product of {a} and {b}?",
)
_SIGNS = {"addition": "+", "subtraction": "-", "multiplication": "×"}
_WORDS = {"addition": _ADD_WORDS, "subtraction": _SUB_WORDS, "multiplication": _MUL_WORDS}


def _operands(kind: str, rng: Random) -> tuple[int, int]:
    if kind == "multiplication":
        return rng.randint(0, 9), rng.randint(0, 9)
    low = 10 if rng.random() < 0.85 else 0
    a, b = rng.randint(low, 99), rng.randint(low, 99)
    return (max(a, b), min(a, b)) if kind == "subtraction" else (a, b)


def _result(kind: str, a: int, b: int) -> int:
    return {"addition": a + b, "subtraction": a - b, "multiplication": a * b}[kind]


def pair_key(a: int, b: int) -> str:
    """The key of a pair of operands: the same for both orders, so neither order leaks."""
    return f"{min(a, b)},{max(a, b)}"


def _exchange(kind: str, rng: Random) -> Exchange:
    a, b = _operands(kind, rng)
    sign = _SIGNS[kind]
    result = str(_result(kind, a, b))
    if rng.random() < 0.3:
        question = rng.choice(_WORDS[kind]).format(a=a, b=b)
    else:
        asked = rng.choice(("*", "x", "×", "×")) if kind == "multiplication" else sign
        gap = "" if rng.random() < 0.2 else " "
        question = rng.choice(_ASK).format(q=f"{a}{gap}{asked}{gap}{b}")
    # The hundred products are facts: for them the unseen thing is the phrasing.
    key = question if kind == "multiplication" else pair_key(a, b)
    return Exchange(kind, question, f"{a} {sign} {b} = {result}.", result, key)


def addition(rng: Random) -> Exchange:
    return _exchange("addition", rng)


def subtraction(rng: Random) -> Exchange:
    return _exchange("subtraction", rng)


def multiplication(rng: Random) -> Exchange:
    return _exchange("multiplication", rng)


def sheet(rng: Random, lines: int) -> list[tuple[str, str]]:
    """A plain-text drill of `lines` sums as (question, result) pairs, no held-out pair in it.

    The densest form of practice: about a third of the tokens are answers.
    """
    kind = rng.choice(("addition", "addition", "addition", "subtraction", "subtraction",
                       "multiplication"))  # fmt: skip
    rows: list[tuple[str, str]] = []
    while len(rows) < lines:
        a, b = _operands(kind, rng)
        if kind == "multiplication" or not is_held_out(kind, pair_key(a, b)):
            rows.append((f"{a} {_SIGNS[kind]} {b} =", f" {_result(kind, a, b)}."))
    return rows
