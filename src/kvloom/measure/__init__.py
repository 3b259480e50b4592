"""Measure: the quality, memory and speed of cache policies on a text, with the engine that serves them."""
