"""From the engine's tokens to the text of an answer."""
