"""How fast and how small the fold is, beside what people use today: `python -m benchmarks.run cpu`."""
