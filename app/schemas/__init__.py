"""Request schemas. `docs/api.md` has a row for each of their fields; a test compares the two."""
