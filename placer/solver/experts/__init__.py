"""Experts to slots: copies per expert and slot per copy, for all scenarios at once."""
