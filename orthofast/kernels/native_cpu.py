"""Native backend (being written)."""
NAME = "native_cpu"
def supports(request): return "not written yet"
