"""The pipeline: rounds through read, exchange and write, all at once."""
