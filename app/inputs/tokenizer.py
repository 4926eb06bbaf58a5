"""Text to token ids and back, on the `tokenizers` library directly: no torch, no transformers."""

from __future__ import annotations

import re
from codecs import utf_8_decode
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import msgspec
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import DecodeStream

# A text of more characters per token than this is measured by its head before it is encoded.
CHARS_PER_TOKEN = 16
# Cutting a text may change the tokens around the cut.
CUT_SLACK = 64
# Prompt tokens a decoder sees first, so that the first word keeps its leading space.
_CONTEXT_TOKENS = 6


class TokenizerError(ValueError):
    """The model folder's text side is of no use to this server; the message says why."""


class PromptTooLongError(ValueError):
    """The text certainly has more tokens than allowed."""


class Tokenizer:
    """Immutable after load; safe to use from several threads."""

    def __init__(self, backend: Backend) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.vocab_size = backend.get_vocab_size()
        decoders = _decoder_types(backend)
        self._is_byte_level = "ByteLevel" in decoders
        # A text is the bytes of its tokens, one after another: true of most models of today.
        self.is_plain_bytes = decoders == {"ByteLevel"}
        added = backend.get_added_tokens_decoder()
        self._added = {i: token.content for i, token in added.items()}
        self.special_tokens = {i: token.content for i, token in added.items() if token.special}

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read `tokenizer.json`. Raises `TokenizerError`."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(f"the model folder has no tokenizer.json: {folder}")
        try:
            return cls(Backend.from_file(str(path)))
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"cannot read {path}: {error}") from error

    def encode(self, text: str, *, add_special_tokens: bool, limit: int) -> list[int]:
        """Token ids of `text`.

        Raises `PromptTooLongError` without encoding all of it when the head alone has more than
        `limit` tokens; a text somewhat longer than `limit` may still be returned.
        """
        head = limit * CHARS_PER_TOKEN
        if len(text) > head:
            ids = self._encode(text[:head], add_special_tokens)
            if len(ids) > limit + CUT_SLACK:
                raise PromptTooLongError
        return self._encode(text, add_special_tokens)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        # A batch, since only for one is the interpreter left to other threads: a megabyte of text
        # given to `encode` by a thread would stop the event loop for half a second.
        (encoding,) = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return list(encoding.ids)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return str(self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    @lru_cache(maxsize=1 << 16)  # noqa: B019 (one tokenizer lives as long as the process)
    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for; a special token's are its name's."""
        if (added := self._added.get(token)) is not None:
            return added.encode()
        piece = self.backend.id_to_token(token)
        if piece is None:
            return b""
        if self._is_byte_level:
            return b"".join(_BYTE_OF_CHAR.get(c) or c.encode() for c in piece)
        if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
            return bytes.fromhex(byte[1])
        return piece.replace("\u2581", " ").encode()

    @lru_cache(maxsize=1 << 16)  # noqa: B019 (as above)
    def written_bytes(self, token: int, skip_special_tokens: bool) -> bytes:
        """What `decode` writes for a token, of a tokenizer that `is_plain_bytes`."""
        if skip_special_tokens and token in self.special_tokens:
            return b""
        piece = self.token_name(token)
        try:
            return b"".join(_BYTE_OF_CHAR[c] for c in piece)
        except KeyError:  # a name in plain text
            return piece.encode()

    def token_name(self, token: int) -> str:
        """How the vocabulary spells a token; "" if it is not in there."""
        return self.backend.id_to_token(token) or ""

    def token_text(self, token: int) -> str:
        """The token's bytes as text; a piece of a character shows as U+FFFD."""
        return self.token_bytes(token).decode(errors="replace")


class TextDecoder:
    """Token ids to text as they come, for one stream. Never gives half a character.

    `prompt` is what precedes; only text after it is given.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], *, skip_special_tokens: bool
    ) -> None:
        self._backend = tokenizer.backend
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._half = b""  # of a character, if a text is the bytes of its tokens
        self._held: list[int] = []  # tokens since the last text, otherwise
        if tokenizer.is_plain_bytes:
            TextDecoder.feed(self, prompt[-_CONTEXT_TOKENS:])
        else:
            self._stream = DecodeStream(_context(tokenizer, prompt), skip_special_tokens)

    def feed(self, tokens: Sequence[int]) -> str:
        """The text that `tokens` complete; often "" inside a character."""
        if self._tokenizer.is_plain_bytes:
            written, skip = self._tokenizer.written_bytes, self._skip
            data = self._half + b"".join([written(token, skip) for token in tokens])
            whole, used = utf_8_decode(data, "replace", False)
            self._half = data[used:]
            return whole
        if not tokens:
            return ""
        try:
            text = self._stream.step(self._backend, list(tokens))
        except Exception:  # the library's "invalid prefix": its context ends inside a character
            self._stream = DecodeStream([], self._skip)
            text = self._stream.step(self._backend, [*self._held, *tokens])
        if text is None:
            self._held += tokens
            return ""
        self._held.clear()
        return text

    def flush(self) -> str:
        """Whole characters still held when generation ends; what remains of a cut one is lost."""
        if not self._held:
            return ""
        text: str = self._backend.decode(self._held, skip_special_tokens=self._skip)
        self._held.clear()
        return text.rstrip("\ufffd")


class MarkedDecoder(TextDecoder):
    """Skips the special tokens in `hidden` only; the others are part of the text."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], hidden: frozenset[int]) -> None:
        super().__init__(tokenizer, prompt, skip_special_tokens=False)
        self._hidden = hidden

    def feed(self, tokens: Sequence[int]) -> str:
        return super().feed([token for token in tokens if token not in self._hidden])


def _context(tokenizer: Tokenizer, prompt: Sequence[int]) -> list[int]:
    """The prompt's last tokens, from one that does not begin inside a character."""
    start = max(len(prompt) - _CONTEXT_TOKENS, 0)
    while start > 0 and 0x80 <= (tokenizer.token_bytes(prompt[start]) or b" ")[0] < 0xC0:
        start -= 1
    return list(prompt[start:])


def _decoder_types(backend: Backend) -> set[str]:
    decoder = msgspec.json.decode(backend.to_str()).get("decoder") or {}
    return {decoder.get("type", "")} | {d["type"] for d in decoder.get("decoders", [])}


def _byte_of_char() -> dict[str, bytes]:
    """GPT-2's byte alphabet: printable bytes are themselves, the rest follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in printable]
    table = {chr(b): bytes([b]) for b in printable}
    return table | {chr(256 + i): bytes([b]) for i, b in enumerate(rest)}


_BYTE_OF_CHAR = _byte_of_char()
