"""Perplexity, multiple choice, exact match, and the record of a result."""
