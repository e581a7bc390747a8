"""Readers: one file per format, each an index without data, and the choice of files in a folder."""
