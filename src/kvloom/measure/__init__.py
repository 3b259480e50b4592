"""Measure: what a cache costs a model on a text in quality, memory and speed, by the engine that serves it."""
