"""Data: random-access sources, transforms in numpy and Pillow, and the loader. Imports no model."""
