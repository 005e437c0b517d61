"""Architectures of transformers, tiny and random: what becomes of each in each format."""
