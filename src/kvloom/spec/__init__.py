"""Torch-free facts: what a block costs, what a model holds, what a policy is."""
