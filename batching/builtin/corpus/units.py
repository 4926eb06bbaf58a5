"""Conversions between units of length, weight, volume and time."""

from random import Random

from .exchange import Exchange

_UNITS = (  # (from, singular, to, factor, largest count)
    ("kilometres", "kilometre", "metres", 1000, 99),
    ("metres", "metre", "centimetres", 100, 99),
    ("centimetres", "centimetre", "millimetres", 10, 99),
    ("kilograms", "kilogram", "grams", 1000, 99),
    ("litres", "litre", "millilitres", 1000, 99),
    ("tonnes", "tonne", "kilograms", 1000, 99),
    ("euros", "euro", "cents", 100, 99),
    ("hours", "hour", "minutes", 60, 12),
    ("minutes", "minute", "seconds", 60, 12),
    ("days", "day", "hours", 24, 10),
    ("weeks", "week", "days", 7, 12),
    ("years", "year", "months", 12, 12),
)
_ASK = (
    "How many {to} are in {n} {unit}?",
    "Convert {n} {unit} to {to}.",
    "How many {to} are there in {n} {unit}?",
    "{n} {unit} in {to}?",
    "What is {n} {unit} in {to}?",
    "Please convert {n} {unit} into {to}.",
)


def units(rng: Random) -> Exchange:
    plural, singular, to, factor, largest = rng.choice(_UNITS)
    n = rng.randint(1, largest)
    unit = singular if n == 1 else plural
    question = rng.choice(_ASK).format(n=n, unit=unit, to=to)
    verb = "is" if n == 1 else "are"
    result = f"{n * factor} {to}"
    # Powers of ten follow a rule, so whole (count, unit) pairs can be held out; the short
    # tables of time are facts.
    key = f"{n} {plural}" if factor in (10, 100, 1000) else question
    return Exchange("units", question, f"{n} {unit} {verb} {result}.", result, key)
