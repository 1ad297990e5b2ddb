"""Tracing: every value of a forward pass, and where another implementation departs from it."""
