"""The machine: devices, processes, paths, outputs that are complete or absent, locks, resumable shards, .npz files.

Knows nothing of models, data or training. Imports no other room. The modules that a command needs before it starts JAX
(arguments, command, launchers, locks, messages, npz, outputs, paths, shards) import no JAX.
"""
