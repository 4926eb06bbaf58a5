"""The project's own text: seeded generators, one file per family, standard library only."""
