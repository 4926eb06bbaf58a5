"""Stop strings: the same output however the text was split."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from app.outputs.stop import StopMatcher

TEXT = st.text(alphabet="abc", max_size=30)
STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=5), min_size=1, max_size=4)


def cut(text: str, stops: list[str], include: bool) -> tuple[str, bool]:
    """The definition: cut at the leftmost occurrence; of two there, the shorter."""
    found = [(text.find(stop), len(stop)) for stop in stops if stop in text]
    if not found:
        return text, False
    at, length = min(found)
    return text[: at + length if include else at], True


@given(TEXT, STOPS, st.lists(st.integers(0, 30), max_size=10), st.booleans())
def test_any_split_equals_cutting_the_whole(
    text: str, stops: list[str], splits: list[int], include: bool
) -> None:
    matcher = StopMatcher(stops, include)
    bounds = [0, *sorted(min(s, len(text)) for s in splits), len(text)]
    pieces = [text[a:b] for a, b in pairwise(bounds)]
    output = "".join([*(matcher.feed(piece) for piece in pieces), matcher.flush()])
    expected, stopped = cut(text, stops, include)
    assert output == expected
    assert (matcher.matched is not None) == stopped


@given(TEXT, STOPS)
def test_never_leaks_and_never_holds_more_than_it_must(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    output = ""
    for i, char in enumerate(text):
        output += matcher.feed(char)
        expected, _ = cut(text, stops, include=False)
        assert expected.startswith(output)
        if matcher.matched is None:
            assert i + 1 - len(output) < max(map(len, stops)) * 2


def test_a_failed_partial_match_is_given_out() -> None:
    matcher = StopMatcher(["world"])
    assert [matcher.feed(t) for t in ("a wo", "rl", "x")] == ["a ", "", "worlx"]


def test_an_earlier_partial_match_wins_over_a_later_whole_one() -> None:
    matcher = StopMatcher(["abcd", "c"])
    assert [matcher.feed(c) for c in "xabcd"] == ["x", "", "", "", ""]
    assert matcher.matched == "abcd"
    matcher = StopMatcher(["abcd", "c"])
    assert "".join(matcher.feed(c) for c in "xabce") == "xab"
    assert matcher.matched == "c"
