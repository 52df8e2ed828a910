"""Folders of transformers: their weights' names, formats and files."""
