"""HTTP itself: reading bodies and queries, writing events and errors, limits, TLS."""
