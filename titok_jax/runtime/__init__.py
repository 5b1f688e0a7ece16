"""The machine: devices, processes, paths here and in buckets, files that are complete or absent, locks, resumable shards.

Knows nothing of models, data or training. Imports no other room. What a command needs before JAX (command, outputs, locks,
paths, shards) imports no JAX.
"""
