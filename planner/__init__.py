"""Layouts, schedules, lowering, cost and memory models, and the search over them."""
