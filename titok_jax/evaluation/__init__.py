"""How good a model is: features of images, metrics on them, references, scores, and whole evaluations in resumable pieces.

Also the comparison with the published code (`parity`). Importing the room imports no JAX.
May import: runtime, data, pictures, models, weights, inference.
"""
