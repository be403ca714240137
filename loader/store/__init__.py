"""Ranges in, verified bytes out."""
