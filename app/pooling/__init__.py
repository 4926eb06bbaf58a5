"""Endpoints that read texts and generate none: embeddings, scores, classes."""
