"""Models that give one row of numbers for a text: embedders, cross-encoders, classifiers."""
