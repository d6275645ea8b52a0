"""Codes and scales in place of weights, in plain PyTorch: what every writer starts from."""
