"""Figures, pages and comparisons of predicted and measured. Never imports torch."""
