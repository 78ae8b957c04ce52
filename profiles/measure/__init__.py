"""The profiler: measures kernels, links and host costs here. The only room of `profiles` with torch."""
