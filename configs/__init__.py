"""Configurations of `titok_jax.train`, one file per kind of training: `--config configs/FILE.py:VARIANT`."""
