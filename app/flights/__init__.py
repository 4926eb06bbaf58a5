"""Why was this slow? What is remembered of each request, and how it is told."""
