"""Structured output: from what a request asks of its text to a compiled grammar."""
