"""The cost model of clusters that are not at hand: steps from published curves of kernels and links."""
