"""One settings schema for flags, environment and YAML. Imports nothing of ours."""
