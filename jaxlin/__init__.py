"""Turn a pretrained Transformer into a linear-time model, in JAX."""
