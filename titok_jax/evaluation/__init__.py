"""Measures the quality of models: features of images, metrics, references, scores, and evaluations in resumable pieces.

It also holds the comparison with the published code (`parity`). Importing this package does not import JAX.
May import: runtime, data, pictures, models, weights, inference.
"""
