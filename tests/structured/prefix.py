"""Whether a text is the beginning of a JSON text."""

from __future__ import annotations

import json

# One of them completes whatever a cut can leave: a number, a word, an escape, a key, a string.
_ENDINGS = (
    "", "0", '"', "null", "ull", "ll", "l", "rue", "ue", "e", "alse", "lse", "se",
    'n"', '0000"', '000"', '00"', '0"', ':0', '":0', '"":0', 'n":0', "+0", "1",
)  # fmt: skip


def is_prefix(text: str) -> bool:
    """Whether some ending makes it JSON."""
    brackets, in_string, escaped = "", False, False
    for character in text:
        if in_string:
            in_string = escaped or character != '"'
            escaped = not escaped and character == "\\"
        elif character == '"':
            in_string = True
        elif character in "{[":
            brackets = {"{": "}", "[": "]"}[character] + brackets
        elif character in "}]":
            brackets = brackets[1:]
    return any(_is_json(text + ending + brackets) for ending in _ENDINGS)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
