"""Trained weights: their published names and layouts, the file formats, model folders, the hub, the table of known models.

One file per format (safetensors, PyTorch, Flax), all read lazily and safely; `pretrained` loads and saves whole models.
May import: runtime, models.
"""
