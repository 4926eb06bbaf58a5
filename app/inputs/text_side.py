"""What a generating model's folder says of text: all that is read before its engine serves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from app.inputs.sampling import SamplingDefaults
from app.inputs.template import ChatTemplate, load_chat_template
from app.inputs.tokenizer import Tokenizer, TokenizerError
from app.turns.style import TurnStyle


@dataclass(frozen=True)
class TextSide:
    """Immutable after load; safe to use from several threads."""

    tokenizer: Tokenizer
    template: ChatTemplate | None
    style: TurnStyle
    defaults: SamplingDefaults

    @classmethod
    def load(cls, folder: Path) -> TextSide:
        """Read the folder. Raises `TokenizerError`."""
        tokenizer = Tokenizer.load(folder)
        try:
            template, defaults = load_chat_template(folder), SamplingDefaults.load(folder)
            style = TurnStyle.load(folder, template, tokenizer)
        except (ValueError, LookupError) as error:  # not JSON, not UTF-8, or not of the right type
            message = f"cannot read the chat template or generation config of {folder}: {error}"
            raise TokenizerError(message) from error
        return cls(tokenizer, template, style, defaults)
