"""Installs exlm_dist and the `exlm` command. Lower bounds only: a CPU build of torch that is there already is kept."""

from pathlib import Path

from setuptools import find_packages, setup

version = next(
    line.split('"')[1]
    for line in Path("exlm_dist/__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

setup(
    name="exlm_dist",
    version=version,
    description="Distributed pretraining of ExLM masked language models for text and molecules",
    long_description=Path("README.md").read_text(encoding="utf-8") if Path("README.md").exists() else "",
    long_description_content_type="text/markdown",
    python_requires=">=3.10",
    packages=find_packages(include=["exlm_dist", "exlm_dist.*"]),
    package_data={"exlm_dist": ["**/README.md"]},
    install_requires=[
        "torch>=2.6",
        "deepspeed>=0.17",
        "megatron-core>=0.16",
        "webdataset>=1.0",
        "sentencepiece>=0.2",
        "rdkit>=2024.9",
        "mlflow>=3.5",
        "safetensors>=0.4",
        "numpy>=1.26",
        "pydantic>=2.7",
        "PyYAML>=6",
        "psutil",
        "tqdm",
        "matplotlib>=3.8",
        "zstandard>=0.22",
    ],
    extras_require={"test": ["pytest>=8", "pytest-timeout", "pytest-xdist>=3.7", "hypothesis"], "parquet": ["pyarrow"]},
    entry_points={"console_scripts": ["exlm=exlm_dist.cli:entry"]},
)
