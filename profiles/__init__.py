"""Facts: models, clusters, workloads, software stacks, and measured kernels and links.

This package stands on the ground floor: it imports nothing else of the project, and torch only in
`profiles.measure`.
"""
