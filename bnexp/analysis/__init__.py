"""Paired predictions in numbers with their uncertainty, and in words. No torch."""
