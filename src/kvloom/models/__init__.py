"""One decoder, many configs: weights in, logits out."""
