"""The shared nouns that every other room speaks: configs, errors, run folders, logging, machine and seed."""
