"""Dynamic batching: a pure scheduler plans, a worker executes, an engine joins the two."""
