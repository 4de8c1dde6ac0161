"""The cache in figures: all.py runs the five parts whose figures README shows."""
