"""Encoding limits, and decoding that never breaks a character."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers

from app.inputs.tokenizer import PromptTooLongError, TextDecoder, Tokenizer, TokenizerError


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> Tokenizer:
    return Tokenizer.load(model_folder)


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    """Llama 2's kind: metaspace, byte fallback, and a decoder that strips the first space."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    pieces += ["\u2581", "a", "b", "\u2581a", "\u2581b", "\u2581ab", "ab"]
    merges = [("\u2581", "a"), ("\u2581", "b"), ("a", "b"), ("\u2581a", "b")]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    model = models.BPE(
        vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    backend = Backend(model)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return Tokenizer(backend)


def pieces_of(tokenizer: Tokenizer, ids: list[int], sizes: list[int]) -> list[str]:
    decoder = TextDecoder(tokenizer, (), skip_special_tokens=True)
    pieces, at = [], 0
    for size in [*sizes, len(ids)]:
        pieces.append(decoder.feed(ids[at : at + size]))
        at += size
    return [*pieces, decoder.flush()]


@settings(max_examples=200)
@given(text=st.text(max_size=40), sizes=st.lists(st.integers(0, 5), max_size=60))
def test_pieces_join_to_the_text(tokenizer: Tokenizer, text: str, sizes: list[int]) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False, limit=1000)
    pieces = pieces_of(tokenizer, ids, sizes)
    assert "".join(pieces) == text.rstrip("\ufffd") or text == "".join(pieces)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=200)
@given(data=st.data(), text=st.text(alphabet="ab é日😀", min_size=1, max_size=20))
def test_a_text_cut_anywhere_is_a_prefix(
    tokenizer: Tokenizer, data: st.DataObject, text: str
) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False, limit=1000)
    cut = data.draw(st.integers(0, len(ids)))
    output = "".join(pieces_of(tokenizer, ids[:cut], [1] * cut))
    assert text.startswith(output)
    known = b"".join(map(tokenizer.token_bytes, ids[:cut]))
    assert output == known.decode(errors="ignore")


@settings(max_examples=100)
@given(ids=st.lists(st.integers(0, 399), max_size=40), sizes=st.lists(st.integers(0, 4)))
def test_any_tokens_decode_the_same_however_they_come(
    tokenizer: Tokenizer, ids: list[int], sizes: list[int]
) -> None:
    at_once = "".join(pieces_of(tokenizer, ids, []))
    assert "".join(pieces_of(tokenizer, ids, sizes)) == at_once
    whole = tokenizer.decode([i for i in ids if i < tokenizer.vocab_size], skip_special_tokens=True)
    assert at_once.rstrip("\ufffd") == whole.rstrip("\ufffd")


@settings(max_examples=200)
@given(text=st.text(alphabet="ab é日😀", max_size=20), split=st.integers(0, 60))
def test_generated_text_keeps_its_leading_space(
    sentencepiece: Tokenizer, text: str, split: int
) -> None:
    ids = sentencepiece.encode("ab " + text, add_special_tokens=False, limit=1000)
    prompt, rest = ids[:split], ids[split:]
    known = b"".join(map(sentencepiece.token_bytes, prompt))[1:]
    if not prompt or known != known.decode(errors="ignore").encode():
        return  # the prompt ends inside a character
    decoder = TextDecoder(sentencepiece, prompt, skip_special_tokens=True)
    output = "".join(decoder.feed((token,)) for token in rest) + decoder.flush()
    assert known.decode() + output == "ab " + text


def test_a_prompt_that_ends_inside_a_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("é日", add_special_tokens=False, limit=100)
    for cut in range(len(ids)):
        decoder = TextDecoder(tokenizer, ids[:cut], skip_special_tokens=True)
        decoder.feed(ids[cut:])
        ascii_ids = tokenizer.encode("hello", add_special_tokens=False, limit=100)
        assert decoder.feed(ascii_ids).endswith("hello")


def test_token_bytes(tokenizer: Tokenizer, sentencepiece: Tokenizer) -> None:
    ids = tokenizer.encode("naïve 日", add_special_tokens=False, limit=100)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == "naïve 日"
    assert tokenizer.token_bytes(0) == b"<|end|>"
    assert tokenizer.token_bytes(10**6) == b""
    ids = sentencepiece.encode("a é", add_special_tokens=False, limit=100)
    assert b"".join(map(sentencepiece.token_bytes, ids)).decode() == " a é"


def test_a_long_text_is_measured_by_its_head(tokenizer: Tokenizer) -> None:
    encoded: list[int] = []

    class Spy:
        def encode_batch_fast(self, texts: list[str], add_special_tokens: bool) -> object:
            encoded.extend(map(len, texts))
            return tokenizer.backend.encode_batch(texts, add_special_tokens=add_special_tokens)

    spied = Tokenizer(tokenizer.backend)
    spied.backend = Spy()  # type: ignore[assignment]
    with pytest.raises(PromptTooLongError):
        spied.encode("x" * 1_000_000, add_special_tokens=False, limit=100)
    assert encoded == [1600]


def test_truncation_in_the_file_is_not_applied(tokenizer: Tokenizer) -> None:
    backend = Backend.from_str(tokenizer.backend.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=50)
    ids = Tokenizer(backend).encode("hello " * 20, add_special_tokens=False, limit=100)
    assert 20 <= len(ids) < 50


def test_folder_without_or_with_a_broken_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="cannot read"):
        Tokenizer.load(tmp_path)


def test_added_tokens_and_pre_tokenizer_free_models_load() -> None:
    backend = Backend(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    assert Tokenizer(backend).token_text(1) == "b"
