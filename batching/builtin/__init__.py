"""The built-in model: its corpus generator, training script, evaluation and weights."""
