"""The runtimes' own converters: each file converts a checkpoint as its users do, and is run in a fresh process."""
