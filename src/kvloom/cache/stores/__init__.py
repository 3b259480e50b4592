"""Storage formats of K and V inside a block."""
