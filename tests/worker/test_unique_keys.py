"""Keys that came already, however they are spelled."""

from __future__ import annotations

import numpy as np
import pytest

from batching.worker.unique_keys import KeyTokens, UniqueKeys

PIECES = [bytes([byte]) for byte in range(256)] + [b'\\u000a"', b'b":', b"end"]
ALL = np.full(-(-len(PIECES) // 32), -1, dtype=np.int32)


def after(text: bytes, *begins: str) -> UniqueKeys:
    keys = UniqueKeys(KeyTokens(PIECES), begins or ("",))
    for byte in text:
        keys.accept(byte)
    return keys


def repeating(text: bytes, *begins: str) -> set[bytes]:
    return {PIECES[token] for token in after(text, *begins).repeating(ALL)}


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


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        (b'{"\\\\":1,"\\', b"\\"),
        (b'{"a":1,"\\u006', b"1"),
        (b'{"\\u00e9":1,"\\u00e', b"9"),
        (b'{"/":1,"\\', b"/"),
        (b'{"\n":1,"\\', b"n"),
        (b'{"ab":1,"\\u006', b""),
    ],
)
def test_tokens_that_complete_an_escape_and_with_it_such_a_key(text: bytes, ends: bytes) -> None:
    assert {PIECES[token] for token in after(text).doubtful()} == {bytes([end]) for end in ends}


def test_values_follow_the_beginning_markers_and_each_other() -> None:
    assert repeating(b'{"ab":1,"a', "</think>") == set()
    assert repeating(b'"{</think>\n{"ab":1,"a', "</think>") == {b'b":'}
    assert repeating(b'I say "{" <call>{"ab":1,"a', "", "<call>") == {b'b":'}
    assert repeating(b'I say {"ab":1,"a', "", "<call>") == set()
    for between in (b"; ", b'\n</call> "\n<call>', b""):
        for first in (b'{"b":"</call>"}', b'{"b":1}'):
            assert repeating(first + between + b'{"ab":1,"a', "", "<call>") == {b'b":'}
    assert repeating(b'[CALLS]f[ARGS]{"ab":1,"a', "[CALLS]", "[ARGS]") == {b'b":'}
