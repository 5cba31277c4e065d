"""The token mixers."""
