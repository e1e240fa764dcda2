"""Matching, classification losses and the set criterion."""
