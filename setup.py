"""Package metadata; tool settings are in pyproject.toml.

`parallel` and `launch` keep their folder names as import names, so a checkout, an editable install and a
wheel all import the same modules. The YAML files of `conf/` travel as package data of `k25_train.conf`.
"""

from setuptools import find_packages, setup

CODE = ["k25_train", "parallel", "launch"]
DALI = ["nvidia-dali-cuda130>=2.4,<2.5"]
# Tools, environments and tasks of agents; each is imported where it is asked for alone.
AGENTS = [
    "ipykernel>=7.4,<8",
    "jupyter-client>=8.10,<9",
    "mcp>=2.3,<3",
    "gymnasium>=1.4,<2",
    "reasoning-gym>=0.1.25,<0.2",
    # What verifiers servers speak over ZeroMQ.
    "msgpack>=1.2,<2",
]
RAY = ["ray>=2.60,<2.61"]

setup(
    name="k25-train",
    version="0.1.0",
    description="Open training system for Kimi-K2.5-class models (MLA + MoE + MoonViT-3D) on megatron-core",
    packages=[*find_packages(include=[p for name in CODE for p in (name, f"{name}.*")]), "k25_train.conf"],
    package_dir={"k25_train.conf": "conf"},
    package_data={
        "k25_train.conf": ["**/*.yaml"],
        "launch": ["templates/*"],
        "k25_train.data": ["overview/*.css"],
        "k25_train.metrics": ["*.css"],
        "k25_train.plan": ["report/html/*.css"],
        "k25_train.rollout": ["status/*.css", "overview/*.css"],
    },
    python_requires=">=3.12",
    # Every range is one that was tried together; megatron-core is patched per version (parallel/megatron).
    install_requires=[
        "torch>=2.13,<2.14",
        # The very release is torch's to choose; where there is none, the CPU does without.
        "triton>=3.7,<3.8; platform_system == 'Linux'",
        "megatron-core==0.19.2",
        "emerging-optimizers==0.3.0",
        "hydra-core>=1.3.8,<1.4",
        "omegaconf>=2.3.1,<2.4",
        "PyYAML>=6.0,<7",
        "numpy>=2.5,<3",
        "safetensors>=0.8,<0.9",
        "pillow>=13,<14",
        "av>=19,<20",
        "resvg-py>=0.5,<0.6",
        "fsspec>=2026.9",
        "s3fs>=2026.9",
        # Speaks to inference engines.
        "aiohttp>=3.14,<4",
        # Event loops of rollouts, and what passes between their processes.
        "uvloop>=0.23,<0.24",
        "pyzmq>=27.3,<28",
        "universal-pathlib>=0.3.10,<0.4",
        "xxhash>=4.1,<5",
        "pyarrow>=26,<27",
        "tokenizers>=0.23,<0.24",
        "tiktoken>=0.14,<0.15",
        "psutil>=7,<8",
        "rich>=15,<16",
        "tensorboard>=2.21,<2.22",
        "matplotlib>=3.11,<3.12",
        # The engine in process writes to this very release's model: where weights go, what a cache is asked.
        "transformers==5.23.0",
    ],
    extras_require={
        "gpu": ["transformer-engine[core_cu13,pytorch]>=2.20,<2.21", *DALI],
        "dali": DALI,
        "agents": AGENTS,
        "ray": RAY,
        # Weights to engines on the trainer's GPUs (rollout.transport=checkpoint_engine).
        "checkpoint-engine": ["checkpoint-engine>=0.4.2,<0.5"],
        # Other places of a run's metrics; both are imported where they are asked for alone.
        "wandb": ["wandb>=0.31,<0.32"],
        "mlflow": ["mlflow>=3.17,<4"],
        "dev": [
            "pytest>=9.2,<10",
            "pytest-xdist>=3.8,<4",
            "hypothesis>=6.170,<7",
            # Its parser judges what k25-status writes.
            "prometheus-client>=0.26,<0.27",
            "ruff==0.17.6",
            "mypy>=2.4,<2.5",
            "types-PyYAML>=6.0,<7",
            "kubernetes-validate>=1.37,<2",
            # S3 over HTTP on localhost, for tests of object stores.
            "moto[server]>=5.2,<6",
            "pre-commit>=4,<5",
            # What INT4 weights are compared with; reads them in transformers.
            "compressed-tensors>=0.20.1,<0.21",
            "torchvision>=0.28,<0.29",
            # docker/pins.lock is made with uv; SPDX's own library validates the image's bill of materials.
            "uv>=0.13,<0.14",
            "spdx-tools>=0.8.5,<0.9",
            # The wheel test builds without isolation, so without a network.
            "setuptools>=77",
            "wheel>=0.45",
            # Unmodified clients of the gateway.
            "openai>=3.57,<4",
            "anthropic>=2.14,<3",
            *DALI,
            *AGENTS,
            *RAY,
        ],
    },
    entry_points={
        "console_scripts": [
            "k25-train=k25_train.train:main",
            "k25-eval=k25_train.eval:main",
            "k25-checkpoint=k25_train.checkpoint.__main__:main",
            "k25-convert=k25_train.convert.__main__:main",
            "k25-data=k25_train.data.__main__:main",
            "k25-dryrun=k25_train.dryrun.__main__:main",
            "k25-metrics=k25_train.metrics.__main__:main",
            "k25-plan=k25_train.plan.__main__:main",
            "k25-preflight=launch.preflight.__main__:main",
            "k25-rl=k25_train.rl.__main__:main",
            "k25-rollout=k25_train.rollout.__main__:main",
            "k25-status=launch.status.__main__:main",
            "k25-submit=launch.slurm:main",
        ]
    },
)
