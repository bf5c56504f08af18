"""Joins the wings. In: a path, and prompts as people write them. Out: a loaded model, its events and results."""
