"""Side-by-side timings of Gram matrices against other libraries, each in its own process: `python -m benchmarks`."""
