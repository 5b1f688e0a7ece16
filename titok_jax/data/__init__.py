"""Data: random-access sources, transforms in numpy and Pillow, token records and shards, and the loader.

May import: runtime.
"""
