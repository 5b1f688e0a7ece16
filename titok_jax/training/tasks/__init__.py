"""Defines the training step of each kind of training.

`base` has what all kinds share: the state, the networks and the step. Each kind has its own file for the rest.
"""
