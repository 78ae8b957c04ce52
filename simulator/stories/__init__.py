"""Long stories, told by SimPy: weeks of one job, hours of a parameter server; events, not tasks."""
