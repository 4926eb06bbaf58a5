"""Frames survive any way of cutting the byte stream."""

from __future__ import annotations

import fcntl
import resource
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batching.core.types import Request, SamplingParams
from batching.engine.channel import ChannelClosed, ChildChannel, FrameBuffer, encode_frame
from batching.engine.messages import Configure, Submit


@given(st.lists(st.binary(max_size=40), max_size=6), st.lists(st.integers(0, 200), max_size=8))
def test_frame_buffer_yields_the_bodies_however_cut(bodies: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(len(b).to_bytes(4, "little") + b for b in bodies)
    buffer, received, last = FrameBuffer(), [], 0
    for cut in sorted(min(c, len(stream)) for c in [*cuts, len(stream)]):
        received += list(buffer.feed(stream[last:cut]))
        last = cut
    assert received == bodies


def test_child_channel_receives_batches_and_notices_the_end() -> None:
    ours, theirs = socket.socketpair()
    channel = ChildChannel(theirs)
    request = Request("r1", [1, 2, 3], SamplingParams(max_tokens=4), arrival=1.5, salt=b"\x00s")
    submit = Submit([request], ["r0"])
    ours.sendall(encode_frame(Configure(b"{}")) + encode_frame(submit))
    assert channel.receive(None) == [Configure(b"{}"), submit]
    assert channel.receive(0.0) == []
    ours.close()
    with pytest.raises(ChannelClosed):
        channel.receive(1.0)


def test_a_descriptor_beyond_what_select_can_watch_works() -> None:
    """A child that is restarted while a thousand clients are connected gets such a one."""
    number = 1024
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, 2 * number), hard), hard))
    ours, theirs = socket.socketpair()
    try:
        high = socket.socket(fileno=fcntl.fcntl(theirs.fileno(), fcntl.F_DUPFD_CLOEXEC, number))
        channel = ChildChannel(high)
        assert channel.receive(0.0) == []
        ours.sendall(encode_frame(Configure(b"{}")))
        assert channel.receive(None) == [Configure(b"{}")]
        high.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        ours.close()
        theirs.close()
