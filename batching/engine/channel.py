"""Length-prefixed msgpack frames over a socket pair: the pipe between front end and engine child.

A frame is a 4-byte little-endian length and that many bytes of msgpack. One frame carries one
message of `batching.engine.messages`; a step's events for all requests share one frame.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator

import msgspec

from batching.engine.messages import FromEngine, ToEngine

HEADER_BYTES = 4
_READ_BYTES = 1 << 18


class ChannelClosed(ConnectionError):
    """The other side is gone."""


_encoder = msgspec.msgpack.Encoder()


def encode_frame(message: FromEngine | ToEngine) -> bytes:
    """A message as one frame."""
    body = _encoder.encode(message)
    return len(body).to_bytes(HEADER_BYTES, "little") + body


class FrameBuffer:
    """Bytes in, whole frame bodies out, however the stream was cut."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Append `data` and yield every body that is now complete."""
        self._bytes += data
        start = 0
        while len(self._bytes) - start >= HEADER_BYTES:
            end = start + HEADER_BYTES
            end += int.from_bytes(self._bytes[start:end], "little")
            if end > len(self._bytes):
                break
            yield bytes(self._bytes[start + HEADER_BYTES : end])
            start = end
        del self._bytes[:start]


class ChildChannel:
    """The engine child's blocking end. Not for use by several threads."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._socket.setblocking(True)
        # Not select(): a child restarted under many connections inherits a number beyond its 1023.
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._frames = FrameBuffer()
        self._decoder = msgspec.msgpack.Decoder(ToEngine)

    def send(self, message: FromEngine) -> None:
        """Blocks while the socket buffer is full. Raises `ChannelClosed`."""
        try:
            self._socket.sendall(encode_frame(message))
        except OSError as error:
            raise ChannelClosed(str(error)) from error

    def receive(self, timeout: float | None) -> list[ToEngine]:
        """All messages that are there, waiting up to `timeout` seconds (None: for ever) for one.

        Raises `ChannelClosed` when the parent is gone.
        """
        messages: list[ToEngine] = []
        wait = None if timeout is None else timeout * 1e3
        while self._poll.poll(0 if messages else wait):
            try:
                data = self._socket.recv(_READ_BYTES)
            except OSError as error:
                raise ChannelClosed(str(error)) from error
            if not data:
                raise ChannelClosed("the front end closed the connection")
            messages += [self._decoder.decode(body) for body in self._frames.feed(data)]
        return messages
