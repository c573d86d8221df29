"""Stand-ins for NVIDIA's libraries, so that PyTorch's CUDA build runs on a CPU without gigabytes of them.

    cuda_stubs.py TORCH_LIB FOLDER      e.g. /opt/venv/lib/python3.13/site-packages/torch/lib

PyTorch's wheel for x86-64 Linux is linked against CUDA and cannot be imported without its libraries,
whatever the machine. Each library that the wheel needs and does not bring is made here with the functions
that the wheel takes from it, under the same versions. They say what CUDA says on a machine without a driver:
no device is there. The wheel itself stays as published. `libcuda.so.1`, the driver, is never made: programs
look for it to detect a GPU.

Needs gcc and readelf. Only the standard library is used.
"""

import re
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

DRIVER = "libcuda.so.1"
OURS = re.compile(r"lib(cu|nccl|nv)")
"""Names of NVIDIA's libraries; another one that is missing is the base's fault."""

SPECIAL = {
    "cudaGetDeviceCount": "int {name}(int *count) { *count = 0; return NO_DEVICE; }",
    "cudaDriverGetVersion": "int {name}(int *version) { *version = 0; return 0; }",
    "cudaGetLastError": "int {name}(void) { return 0; }",
    "cudaPeekAtLastError": "int {name}(void) { return 0; }",
    "cudnnGetVersion": "unsigned long {name}(void) { return 0; }",
    "cuptiGetResultString": "int {name}(int code, const char **text) { *text = WORDS; return 0; }",
    "cudnnGetLastErrorString": "void {name}(char *text, unsigned long size) { if (size) *text = 0; }",
    # Kernels are registered when a library is loaded, which must be harmless.
    "__cudaRegisterFatBinary": "void **{name}(void) { static void *handle; return &handle; }",
}
"""Functions whose callers read more than a status."""

RETURNS_TEXT = re.compile(r"Get(Error|Status)(String|Name)$|GetLastError$")
"""Functions that return a text."""

HEAD = """#define NO_DEVICE 100 /* cudaErrorNoDevice; an error for every library */
#define WORDS "no CUDA device: this image is for CPUs"
"""


@dataclass(frozen=True, slots=True)
class Needs:
    """What one library takes from others."""

    libraries: tuple[str, ...]
    functions: tuple[tuple[str, str], ...]
    """Name, and version or an empty text."""
    sources: tuple[tuple[str, str], ...]
    """Version, and the library that has it."""


def needs_of(library: Path) -> Needs:
    """Read the dynamic section. Raises CalledProcessError if it is not a library."""
    command = ["readelf", "--wide", "--dynamic", "--dyn-syms", "--version-info", str(library)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    libraries = re.findall(r"\(NEEDED\)\s+Shared library: \[(.+?)\]", text)
    functions = re.findall(r"\s(?:FUNC|NOTYPE)\s+GLOBAL\s+DEFAULT\s+UND (\w+)(?:@(\S+))?", text)
    sources, source = [], ""
    for line in text.splitlines():
        if found := re.search(r"Version: \d+\s+File: (\S+)", line):
            source = found[1]
        elif found := re.search(r"Name: (\S+)\s+Flags: .*Version: \d+", line):
            sources.append((found[1], source))
    return Needs(tuple(libraries), tuple(functions), tuple(sources))


def missing_functions(torch_lib: Path) -> dict[str, dict[str, set[str]]]:
    """Functions by missing library and version.

    A function without version may be in any of the libraries that have none, so each of these gets it.
    """
    brought = {path.name: needs_of(path) for path in sorted(torch_lib.glob("*.so*"))}
    missing = {
        name
        for needs in brought.values()
        for name in needs.libraries
        if name not in brought and OURS.match(name) and name != DRIVER
    }
    found: dict[str, dict[str, set[str]]] = {name: defaultdict(set) for name in sorted(missing)}
    for needs in brought.values():
        source_of = dict(needs.sources)
        for name, version in needs.functions:
            if version and source_of.get(version) in missing:
                found[source_of[version]][version].add(name)
    versionless = {
        name
        for needs in brought.values()
        for name, version in needs.functions
        if not version and re.match(r"(cu|nccl|nv)[A-Za-z]+", name)
    }
    for versions in found.values():
        if not versions:
            versions[""] = set(versionless)
    return found


def source_of(functions: set[str]) -> str:
    """C source of a library with these functions."""
    lines = [HEAD]
    for name in sorted(functions):
        if name in SPECIAL:
            lines.append(SPECIAL[name].replace("{name}", name))
        elif RETURNS_TEXT.search(name):
            lines.append(f"const char *{name}(void) {{ return WORDS; }}")
        else:
            lines.append(f"int {name}(void) {{ return NO_DEVICE; }}")
    return "\n".join(lines) + "\n"


def build(name: str, versions: dict[str, set[str]], folder: Path) -> None:
    """Compile one library."""
    functions = set().union(*versions.values())
    script = folder / f"{name}.map"
    script.write_text(
        "".join(
            f"{version} {{ global: {' '.join(f'{function};' for function in sorted(names))} }};\n"
            for version, names in sorted(versions.items())
            if version and names
        )
    )
    options = [f"-Wl,--version-script={script}"] if script.read_text() else []
    subprocess.run(
        [
            *("gcc", "-shared", "-fPIC", "-Os", "-s", "-w", "-fno-builtin", "-x", "c", "-"),
            *options,
            *(f"-Wl,-soname,{name}", "-o", str(folder / name)),
        ],
        input=source_of(functions),
        text=True,
        check=True,
    )
    script.unlink()


def main(torch_lib: Path, folder: Path) -> None:
    """Make all libraries that are missing, and say which."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, versions in missing_functions(torch_lib).items():
        build(name, versions, folder)
        print(f"{name}: {sum(map(len, versions.values()))} functions")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
