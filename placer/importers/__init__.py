"""Readers for files that other tools write."""
