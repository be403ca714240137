"""Bytes of headers and index files to catalog entries, with every claim checked."""
