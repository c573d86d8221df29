"""Stand-ins for NVIDIA's libraries: which are made, with what in them; programs load and call them."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.image_files import script

pytestmark = pytest.mark.skipif(
    not (shutil.which("gcc") and shutil.which("readelf")), reason="needs gcc and readelf"
)
stubs = script("cuda_stubs")
NO_DEVICE = 100

LIBRARY = """
int cudaGetDeviceCount(int *); int cudaMalloc(void **, unsigned long); const char *cudaGetErrorString(int);
int ncclCommAbort(void *); const char *ncclGetLastError(void *); void **__cudaRegisterFatBinary(void *);
int count(int *n) { return cudaGetDeviceCount(n); }
int allocate(void) { return cudaMalloc(0, 1); }
const char *words(void) { return cudaGetErrorString(1); }
int stop(void) { return ncclCommAbort(0); }
const char *last(void) { return ncclGetLastError(0); }
int registered(void) { return __cudaRegisterFatBinary(0) != 0; }
"""


def compile_library(path: Path, source: str, *options: str) -> None:
    """A shared library."""
    command = ["gcc", "-shared", "-fPIC", "-w", "-x", "c", "-", "-x", "none", "-o", str(path), *options]
    subprocess.run(command, input=source, text=True, check=True)


@pytest.fixture(scope="module")
def torch_lib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that is linked as PyTorch's are: with versions, without, and against the driver."""
    real = tmp_path_factory.mktemp("real")
    (real / "map").write_text("libcudart.so.13 { global: cuda*; __cuda*; };\n")
    names = "cudaGetDeviceCount cudaMalloc cudaGetErrorString __cudaRegisterFatBinary"
    compile_library(
        real / "libcudart.so.13",
        "".join(f"void {name}(void) {{}}\n" for name in names.split()),
        f"-Wl,--version-script={real / 'map'},-soname,libcudart.so.13",
    )
    for name, functions in (("libnccl.so.2", "ncclCommAbort ncclGetLastError"), ("libcuda.so.1", "cuInit")):
        source = "".join(f"void {function}(void) {{}}\n" for function in functions.split())
        compile_library(real / name, source, f"-Wl,-soname,{name}")
    folder = tmp_path_factory.mktemp("torch")
    linked = [str(real / name) for name in ("libcudart.so.13", "libnccl.so.2", "libcuda.so.1")]
    # As in the wheel, what needs the driver is a library of its own.
    driver = "int cuInit(int); int drive(void) { return cuInit(0); }"
    compile_library(folder / "libdriver.so", driver, linked[2])
    compile_library(folder / "libtorch_cpu.so", LIBRARY, *linked[:2])
    return folder


@pytest.fixture(scope="module")
def made(torch_lib: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-ins for what that library misses."""
    folder = tmp_path_factory.mktemp("stubs")
    stubs.main(torch_lib, folder)
    return folder


def test_libraries_that_are_missing_are_made_but_never_the_driver(made: Path) -> None:
    assert sorted(path.name for path in made.iterdir()) == ["libcudart.so.13", "libnccl.so.2"]


USE = """
import ctypes, sys
*stand_ins, torch = sys.argv[1:]
for path in stand_ins:
    ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
library, count = ctypes.CDLL(torch), ctypes.c_int(7)
library.words.restype = library.last.restype = ctypes.c_char_p
status = library.count(ctypes.byref(count))
print((status, count.value, library.allocate(), library.stop(), library.words(), library.last()))
print(library.registered())
"""
"""Loads the stand-ins, then the library that needs them, and uses it."""


def test_programs_load_them_and_hear_that_no_device_is_there(made: Path, torch_lib: Path) -> None:
    """In a process of their own: another test may have loaded PyTorch with CUDA's libraries."""
    paths = [*sorted(made.iterdir()), torch_lib / "libtorch_cpu.so"]
    done = subprocess.run([sys.executable, "-c", USE, *paths], capture_output=True, text=True, check=True)
    words = b"no CUDA device: this image is for CPUs"
    assert done.stdout == f"{(NO_DEVICE, 0, NO_DEVICE, NO_DEVICE, words, words)}\n1\n"


def test_versions_are_those_that_are_asked_for(made: Path) -> None:
    """Otherwise every start of Python prints a warning per library."""
    text = subprocess.check_output(["readelf", "--wide", "--dyn-syms", made / "libcudart.so.13"], text=True)
    assert set(re.findall(r"(\w+)@@libcudart\.so\.13", text)) >= {"cudaMalloc", "cudaGetDeviceCount"}


def test_other_libraries_that_are_missing_are_not_hidden(torch_lib: Path, tmp_path: Path) -> None:
    compile_library(tmp_path / "libgone.so.1", "int gone(void) { return 0; }", "-Wl,-soname,libgone.so.1")
    source = "int gone(void); int a(void) { return gone(); }"
    (tmp_path / "lib").mkdir()
    compile_library(tmp_path / "lib" / "libtorch.so", source, str(tmp_path / "libgone.so.1"))
    assert stubs.missing_functions(tmp_path / "lib") == {}


@pytest.mark.parametrize(
    ("name", "returns_text"),
    [
        ("cudaGetErrorString", True),
        ("ncclGetErrorString", True),
        ("cublasLtGetStatusString", True),
        ("cublasGetStatusName", True),
        ("ncclGetLastError", True),
        ("cudaGetErrorName", True),
        ("cudaGetDevice", False),
        ("cudaDeviceGetName", False),
        ("nvrtcGetProgramLog", False),
    ],
)
def test_functions_that_return_a_text(name: str, returns_text: bool) -> None:
    assert (f"const char *{name}(void)" in stubs.source_of({name})) is returns_text
