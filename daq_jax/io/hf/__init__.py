"""Hugging Face folders: tensor files, names of weights, stored forms of codes and scales."""
