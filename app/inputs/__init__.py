"""From a checked request to what the engine takes: templates, tokens, sampling parameters."""
