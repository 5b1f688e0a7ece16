"""Pictures for people: labelled grids of images (Pillow) and plots of numbers (matplotlib).

May import: runtime, data.
"""
