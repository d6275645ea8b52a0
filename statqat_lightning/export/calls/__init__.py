"""One forward call of a model: its arguments, cut, copied and converted; its open dimensions."""
