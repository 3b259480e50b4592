"""Ownership of the cache's bytes: arena, blocks, lanes, prefix index, stores."""
