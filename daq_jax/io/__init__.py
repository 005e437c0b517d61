"""Checkpoints on disk: files and folders of tensors, read and written in bounded memory.

The core imports nothing from here.
"""
