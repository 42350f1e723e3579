"""Pieces of a decoder: each mechanism has one file, with its formula on top."""
