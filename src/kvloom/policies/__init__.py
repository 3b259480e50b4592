"""Eviction policies: scorer x budget x trigger x action. Independent of model classes and engine."""
