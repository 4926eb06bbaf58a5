"""Measure any OpenAI-style server over HTTP. Never imports app or torch."""
