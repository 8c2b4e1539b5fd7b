"""How good the videos of a bundle are, on clips whose truth is known: `python -m benchmarks.quality`."""
