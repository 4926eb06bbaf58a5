r"""Regular expressions of clients in the dialect of llguidance (Rust's `regex`).

JSON Schema's are JavaScript's, where `\d` and `\w` are ASCII; Rust's and Python's have all of
Unicode. ASCII satisfies each of them. In brackets, Rust would begin another class at `[`.
"""

from __future__ import annotations

import re

_CLASSES = {"d": "0-9", "w": "0-9A-Za-z_"}
_PIECE = re.compile(r"\\.|.", re.DOTALL)


def translate(expression: str) -> str:
    """The same expression, its shorthands spelled out."""
    pieces: list[str] = []
    in_class = False
    for piece in _PIECE.findall(expression):
        begins = in_class and pieces[-1] in ("[", "[^")
        if in_class and piece == "^" and pieces[-1] == "[":
            pieces[-1] = "[^"
            continue
        if piece[0] == "\\" and len(piece) == 2:
            piece = _escape(piece, in_class)
        elif piece == "[" and in_class:
            piece = r"\["
        elif piece == "[":
            in_class = True
        elif piece == "]" and in_class and begins:
            piece = r"\]"
        elif piece == "]":
            in_class = False
        pieces.append(piece)
    return "".join(pieces)


def _escape(piece: str, in_class: bool) -> str:
    name = piece[1]
    if name.lower() in _CLASSES and not (in_class and name.isupper()):
        members = _CLASSES[name.lower()]
        return members if in_class else f"[{'^' * name.isupper()}{members}]"
    return r"\z" if name == "Z" else piece
