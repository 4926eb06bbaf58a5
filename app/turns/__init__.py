"""A model's turn taken apart: text, reasoning and tool calls, as they are generated."""
