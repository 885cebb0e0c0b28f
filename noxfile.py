"""Everything that must pass, each in an environment of its own: `nox` runs it all, `nox -s latest` one of them.

The two test environments hold gigabytes of pinned packages. They are kept outside the checkout (in $XDG_CACHE_HOME or
~/.cache, under iks-plugin), named by what they were made from, and used again by every checkout that pins the same.
Each session then installs just this project on top, in a fresh environment that sees the kept one.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from pathlib import Path

import nox

nox.options.sessions = ["lint", "latest", "classic"]

HERE = Path(__file__).parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "iks-plugin" / "environments"

TEST_TOOLS = [
    "constriction",
    "hypothesis",
    "matplotlib",
    "numba",
    "pillow",
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "safetensors",
    "scikit-image",
    "spandrel",
    "tensorboard",
    "tqdm",
]

# Each a list of `pip install` calls. BasicSR's own set-up imports torch, so torch goes first, and setuptools 80 took
# away what that set-up needs.
BASICSR_NEEDS = ["setuptools", "wheel", "cython", "numpy", "torch", "torchvision"]
ONNX = ["onnx", "onnxruntime", "onnxscript"]
TRAINERS = ["accelerate", "lightning"]
LATEST = [BASICSR_NEEDS, ["--no-build-isolation", "basicsr", "mypy", "ruff", *ONNX, *TRAINERS, *TEST_TOOLS]]
CLASSIC = [
    BASICSR_NEEDS,
    [
        "--no-build-isolation",
        "basicsr",
        "mmengine",
        "mmagic",
        "mmcv-lite",
        "diffusers",
        "transformers",
        "huggingface_hub",
        "albumentations",
        "opencv-python",
        *TEST_TOOLS,
    ],
]


def _classic_python() -> str | None:
    """torch 2.1, the oldest one supported, has builds for Python up to 3.11; None is the running interpreter."""
    if sys.version_info[:2] <= (3, 11):
        return None
    return next((version for version in ("3.11", "3.10") if shutil.which(f"python{version}")), "3.11")


@nox.session
def lint(session: nox.Session) -> None:
    """The linter, the formatter and the type checker."""
    _use(session, "latest", LATEST)
    session.run("python", "-m", "ruff", "check", ".")
    session.run("python", "-m", "ruff", "format", "--check", ".")
    session.run("python", "-m", "mypy")


@nox.session
def latest(session: nox.Session) -> None:
    """The tests on the newest torch and numpy, with real BasicSR, Lightning and Accelerate."""
    _test(session, "latest", LATEST)


@nox.session(python=_classic_python())
def classic(session: nox.Session) -> None:
    """The tests on the oldest supported torch, with real BasicSR and MMagic."""
    _test(session, "classic", CLASSIC)


def _test(session: nox.Session, name: str, installs: list[list[str]]) -> None:
    _use(session, name, installs)
    session.install("--quiet", "--no-deps", ".")
    # A worker for each core, and one thread for each worker: the models of the tests are too small to gain from more.
    # What one process has compiled the next one must find, whatever is set outside: the tests start many, and
    # torch with BasicSR or MMagic takes three times as long to import where all of it is compiled once more.
    env = {"IKS_TEST_ENVIRONMENT": name, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""}
    session.run("python", "-m", "pytest", "-n", "auto", "--dist", "worksteal", *session.posargs, env=env)


def _use(session: nox.Session, name: str, installs: list[list[str]]) -> None:
    """Let the session's environment see the kept one called `name`, which is made first where it is missing."""
    kept = _kept_environment(session, name, installs)
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    kept_packages = session.run_install(str(kept / "bin" / "python"), "-c", query, external=True, silent=True)
    own_packages = session.run_install("python", "-c", query, silent=True)
    assert isinstance(kept_packages, str) and isinstance(own_packages, str)
    # addsitedir, not the bare path, so that .pth files in the kept environment count too.
    line = f"import site; site.addsitedir({kept_packages.strip()!r})\n"
    Path(own_packages.strip(), "kept_environment.pth").write_text(line)


def _kept_environment(session: nox.Session, name: str, installs: list[list[str]]) -> Path:
    constraints = HERE / "constraints" / f"{name}.txt"
    version = session.run_install("python", "-c", "import sys; print('%d.%d' % sys.version_info[:2])", silent=True)
    assert isinstance(version, str)
    version = version.strip()
    recipe = hashlib.sha256((constraints.read_text() + repr(installs)).encode()).hexdigest()[:12]
    kept = CACHE / f"{name}-py{version}-{recipe}"
    if (kept / "complete").exists():
        session.log(f"{name} environment: {kept}")
        return kept
    session.log(f"making the {name} environment in {kept}: some minutes and about 6 GB, once")
    shutil.rmtree(kept, ignore_errors=True)
    session.run_install("python", "-m", "venv", str(kept))
    for packages in installs:
        # Python compiles what it imports; to compile all of it here would be half of the work.
        pip = [str(kept / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        session.run_install(*pip, "--no-compile", "--constraint", str(constraints), *packages, external=True)
    (kept / "complete").touch()
    return kept
