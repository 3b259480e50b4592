"""Requests, scheduling, one step at a time."""
