"""Training steps and samplers compiled for TPU slices on a machine without a TPU: memory, collectives, estimated time.

Importing the room imports no JAX, because `slices.topology_devices` must first set environment variables for the compiler.
May import: every other room.
"""
