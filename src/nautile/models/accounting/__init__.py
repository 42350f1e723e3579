"""Parameters, FLOPs and bytes of a decoder, from its shape alone: nothing is allocated, and torch is not needed."""
