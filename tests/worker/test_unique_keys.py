"""Keys that came already, however they are spelled."""

from __future__ import annotations

import numpy as np
import pytest

from batching.worker.unique_keys import KeyTokens, UniqueKeys

PIECES = [bytes([byte]) for byte in range(256)] + [b'\\u000a"', b'b":', b"end"]
ALL = np.full(-(-len(PIECES) // 32), -1, dtype=np.int32)


def after(text: bytes) -> UniqueKeys:
    keys = UniqueKeys(KeyTokens(PIECES))
    for byte in text:
        keys.accept(byte)
    return keys


def repeating(text: bytes) -> set[bytes]:
    return {PIECES[token] for token in after(text).repeating(ALL)}


@pytest.mark.parametrize("first", [b"\\n", b"\\u000a", b"\\u000A"])
def test_a_key_may_not_come_again_in_another_spelling(first: bytes) -> None:
    assert repeating(b'{"' + first + b'":1,"') == {b'\\u000a"'}
    assert repeating(b'{"' + first + b'":1,"\\n') == {b'"'}


def test_other_keys_other_objects_and_values_may_come() -> None:
    assert repeating(b'{"a":1,"') == set()
    assert repeating(b'{"a":{"a') == set()
    assert repeating(b'{"a":"a') == set()
    assert repeating(b'{"ab":1,"a') == {b'b":'}


def test_what_is_no_json_string_is_no_key() -> None:
    assert repeating(b'{"\\q":1,"\\q') == set()
    assert after(b'{"a":1,"\\u00').doubtful() == []


def test_tokens_that_leave_only_the_quote_of_a_key_that_came() -> None:
    assert [PIECES[token] for token in after(b'{"send":1,"s').doubtful()] == [b"end"]
    assert after(b'{"send":1,"S').doubtful() == []
    assert [PIECES[token] for token in after(b'{"send":1,"\\u0073').doubtful()] == [b"end"]
