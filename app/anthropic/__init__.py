"""Anthropic's Messages API: a chat turn as content blocks."""
