"""`slipstream key new NAME`: a secret for its holder, and the line for the file of keys."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Sequence

_USAGE = """\
usage: slipstream key new NAME

Prints a new secret, once, and the line of the file (--api-key-file) that lets it in:

  slipstream key new alice >> keys.yaml

What else the line may say is in docs/operations.md."""


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    if list(arguments) in (["--help"], ["-h"]):
        print(_USAGE)
        return 0
    from app.access.keys import NAME, digest_of

    if len(arguments) != 2 or arguments[0] != "new" or not NAME.fullmatch(arguments[1]):
        message = "expected: slipstream key new NAME, where NAME is up to 64 of A-Z a-z 0-9 . _ -"
        print(f"slipstream key: error: {message}", file=sys.stderr)
        return 2
    secret = f"sk-{secrets.token_urlsafe(32)}"
    print(f"secret, shown only now: {secret}", file=sys.stderr)
    print(f"{arguments[1]}: {{sha256: {digest_of(secret)}}}")
    return 0
