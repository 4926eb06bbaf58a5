"""The digital twin: the production scheduler on a virtual clock."""
