"""Task graph to timeline: the engines. Imports nothing else of the project, and never torch."""
