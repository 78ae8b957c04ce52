"""The profiler of kernels, links and host costs: the only room of `profiles` with torch."""
