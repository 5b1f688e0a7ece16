"""Training: recipes, tasks (what one step does), losses, optimizer, checkpoints, logs, and the loop that joins them.

May import: runtime, data, pictures, models, weights, inference, evaluation.
"""
