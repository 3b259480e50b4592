"""Who owns which bytes: arena, blocks, lanes, prefix index, stores."""
