"""Rows of recorded kernel behaviour, replayed on the model or on the live kernel.

A row is a sequence of memory-mapping operations with the outcome of each, recorded on Linux 6.18.
See `tests/model/cases/README.md` for the format.
"""
