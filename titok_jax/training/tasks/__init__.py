"""What one training step of each kind of training does, told like the method section of a paper.

`base` has what all kinds share: the state, the networks, the step. One file per kind has the rest.
"""
