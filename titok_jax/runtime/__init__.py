"""The machine: devices, processes, local and bucket paths, files that are complete or absent, locks, resumable shards.

Knows nothing of models, data or training. Imports no other room. The modules that a command needs before it starts JAX
(command, messages, outputs, locks, paths, shards) import no JAX.
"""
