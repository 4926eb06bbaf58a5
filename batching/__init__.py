"""Dynamic batching: a pure scheduler plans steps, a worker executes them, an engine joins the two."""
