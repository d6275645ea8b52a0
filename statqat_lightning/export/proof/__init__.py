"""The proof that a file is right: it is run by its runtime and compared with the trained model."""
