"""Trained weights: their published names and layouts, the file formats, model folders, the hub, the table of known models.

Each format (safetensors, PyTorch, Flax) has one module. All are read lazily and safely. `model_files` finds a model's files,
`pretrained` loads and saves it.
May import: runtime, models.
"""
