"""Training: recipes, tasks (what one step does), losses, optimizer, checkpoints, logs, and the training loop.

May import: runtime, data, pictures, models, weights, inference, evaluation.
"""
