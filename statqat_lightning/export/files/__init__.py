"""File types: one writer and reader each, and the registry of them, `kinds`."""
