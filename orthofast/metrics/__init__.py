"""Metrics: short formulas on records, one file per family; the table of all of them is in ``catalog``."""
