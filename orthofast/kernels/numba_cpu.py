"""Numba backend (being written)."""
NAME = "numba_cpu"
def supports(request): return "not written yet"
