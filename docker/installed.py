"""The packages that are installed here, Python's and Debian's, as a bill of materials (sbom.py) has them."""

import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import Distribution
from pathlib import Path
from urllib.parse import quote

UNKNOWN = "NOASSERTION"
OS_RELEASE, DOC = Path("/etc/os-release"), Path("/usr/share/doc")

CLASSIFIERS = {
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD-3-Clause",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
    "The Unlicense (Unlicense)": "Unlicense",
}
"""SPDX identifiers of trove classifiers. BSD's does not say which; most packages with it have three clauses,
and the original text is in the comment."""
TEXTS = {
    "apache 2.0": "Apache-2.0",
    "apache license 2.0": "Apache-2.0",
    "apache license, version 2.0": "Apache-2.0",
    "apache-2.0": "Apache-2.0",
    "apache 2": "Apache-2.0",
    "apache 2.0 license": "Apache-2.0",
    "apache software license 2.0": "Apache-2.0",
    "3-clause bsd license": "BSD-3-Clause",
    "bsd": "BSD-3-Clause",
    "bsd-3-clause": "BSD-3-Clause",
    "bsd-2-clause": "BSD-2-Clause",
    "mit": "MIT",
    "mit license": "MIT",
    "mpl-2.0": "MPL-2.0",
    "psf-2.0": "PSF-2.0",
    "isc": "ISC",
}
"""SPDX identifiers of what packages write as `License`, in lower case."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """What is known of one package."""

    kind: str
    """`python` or `debian`."""
    name: str
    version: str
    purl: str
    license: str
    """An SPDX expression, or NOASSERTION."""
    license_note: str
    """What the package itself says of its licence; may be empty."""
    supplier: str
    sha256: str
    """Of the file it was installed from; empty if that is not known."""
    license_text: str = ""
    """Of a licence that only the package itself defines (LicenseRef-…)."""


def canonical(name: str) -> str:
    """A Python package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def locked_hashes(lock: Path) -> dict[str, dict[str, str]]:
    """SHA-256 by file name, by package."""
    found = {}
    for line in lock.read_text(encoding="utf-8").splitlines():
        pin, _, files = line.partition("  # ")
        if "==" in pin:
            found[pin.partition("==")[0]] = dict(
                zip(files.split(), re.findall(r"sha256:(\w+)", pin), strict=True)
            )
    return found


def installed_file(distribution: Distribution, files: dict[str, str]) -> str:
    """Hash of the file a package was installed from: the wheel of its tags, or the source distribution."""
    tags = re.findall(r"^Tag: (\S+)", distribution.read_text("WHEEL") or "", re.MULTILINE)
    for name, digest in files.items():
        if not name.endswith(".whl"):
            return digest
        pythons, abis, platforms = name.removesuffix(".whl").split("-")[-3:]
        if any(
            python in pythons.split(".") and abi in abis.split(".") and platform in platforms.split(".")
            for python, abi, platform in (tag.split("-", 2) for tag in tags)
        ):
            return digest
    return ""


def license_of(distribution: Distribution) -> tuple[str, str]:
    """SPDX expression of a Python package, and what it says itself."""
    metadata = distribution.metadata
    if expression := metadata.get("License-Expression"):
        return str(expression), ""
    text = str(metadata.get("License") or "").strip()
    classifiers = [
        line.rpartition(" :: ")[2]
        for line in metadata.get_all("Classifier", [])
        if str(line).startswith("License ::") and " :: " in str(line).removeprefix("License :: ")
    ]
    first = text.partition("\n")[0].strip()
    note = "; ".join([*([first] if first else []), *classifiers])
    words = [TEXTS.get(word.strip().lower()) for word in first.split(" AND ")]
    if None not in words:
        return " AND ".join(word for word in words if word), note
    known = [CLASSIFIERS[name] for name in classifiers if name in CLASSIFIERS]
    return (" OR ".join(dict.fromkeys(known)) if known and len(known) == len(classifiers) else UNKNOWN), note


def own_text(distribution: Distribution) -> str:
    """Text of the licence files in a package; says so if there are none."""
    files = [file for file in distribution.files or [] if re.search(r"licen[cs]e", file.name, re.IGNORECASE)]
    texts = [Path(str(file.locate())).read_text(encoding="utf-8", errors="replace") for file in files]
    return "\n".join(texts).strip() or f"{distribution.metadata['Name']} contains no licence file"


def python_packages(found: Iterable[Distribution], locked: dict[str, dict[str, str]]) -> list[Package]:
    """All Python packages; of those that hide others of the same name, the first."""
    packages: dict[str, Package] = {}
    for distribution in found:
        name = canonical(distribution.metadata["Name"])
        spdx, note = license_of(distribution)
        author = distribution.metadata.get("Author") or distribution.metadata.get("Author-email") or ""
        package = Package(
            kind="python",
            name=name,
            version=distribution.version,
            purl=f"pkg:pypi/{name}@{quote(distribution.version, safe='')}",
            license=spdx,
            license_note=note,
            supplier=one_line(author),
            sha256=installed_file(distribution, locked.get(name, {})),
            license_text=own_text(distribution) if "LicenseRef-" in spdx else "",
        )
        packages.setdefault(name, package)
    return [packages[name] for name in sorted(packages)]


def debian_packages(os_release: Path = OS_RELEASE, doc: Path = DOC) -> list[Package]:
    """All packages that dpkg has installed. Raises CalledProcessError if dpkg fails."""
    system = dict(
        line.replace('"', "").split("=", 1) for line in os_release.read_text().splitlines() if "=" in line
    )
    distro = f"{system['ID']}-{system.get('VERSION_ID', system.get('VERSION_CODENAME', ''))}"
    shown = "${db:Status-Status}\t${Package}\t${Version}\t${Architecture}\t${Maintainer}\n"
    done = subprocess.run(
        ["dpkg-query", "--show", f"--showformat={shown}"], capture_output=True, text=True, check=True
    )
    packages = []
    for line in sorted(done.stdout.splitlines()):
        status, name, version, architecture, maintainer = line.split("\t")
        if status != "installed":
            continue
        purl = f"pkg:deb/{system['ID']}/{quote(name)}@{quote(version, safe=':~')}"
        packages.append(
            Package(
                kind="debian",
                name=name,
                version=version,
                purl=f"{purl}?arch={architecture}&distro={distro}",
                license=UNKNOWN,
                license_note=copyright_names(doc / name / "copyright"),
                supplier=one_line(maintainer),
                sha256="",
            )
        )
    return packages


def copyright_names(path: Path) -> str:
    """Debian's short names of the licences in a machine-readable copyright file; where they are in others."""
    if not path.is_file():
        return ""
    text = path.read_text(encoding="utf-8", errors="replace")
    names = sorted(set(re.findall(r"^License:[ \t]*(\S.*?)[ \t]*$", text, re.MULTILINE)))
    if not text.startswith("Format:") or not names:
        return f"see {path}"
    return f"Debian's names: {', '.join(names)}"


def one_line(text: str) -> str:
    """A text without line breaks and without what an SPDX supplier may not contain."""
    return " ".join(str(text).split()).replace("(", "[").replace(")", "]")
