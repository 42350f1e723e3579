"""Twins of the reference for training on CPUs: explicit backward passes that save little and copy less."""
