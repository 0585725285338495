"""Parses what the user asked for once, into frozen objects that remember where each value came from."""
