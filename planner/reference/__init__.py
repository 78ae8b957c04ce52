"""The cost model of clusters that are not at hand: steps from published kernels and links."""
