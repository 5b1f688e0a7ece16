"""Training steps and samplers compiled for TPU slices on a machine without a TPU: memory, collectives, estimated time.

Importing the room imports no JAX: the environment of the TPU compiler must be set first (`slices.topology_devices`).
May import: every other room.
"""
