"""Writes the software bill of materials of the image this runs in, as SPDX 2.3 in JSON.

    sbom.py OUT --lock pins.lock --version V --revision R --base NAME@DIGEST --created SECONDS

It lists Python packages with the hash of the file each was installed from, and Debian's packages; each with
its version, licence as far as it is stated in a form that SPDX knows, and package URL. The same image gives
the same bytes. Only the standard library is used, so that the image gets no package for it.
"""

import argparse
import json
import re
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from installed import UNKNOWN, Package, debian_packages, locked_hashes, python_packages


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """What is known of the image itself."""

    version: str
    revision: str
    base: str
    """NAME@DIGEST, or a name alone."""
    created: int
    """Seconds since 1970, of the commit."""


def document(image: Image, packages: Sequence[Package]) -> dict[str, Any]:
    """The SPDX document."""
    created = datetime.fromtimestamp(image.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    root, base = "SPDXRef-image", "SPDXRef-base"
    base_name, _, digest = image.base.partition("@")
    entries = [
        entry(root, "k25-train", image.version, "CONTAINER") | {"comment": f"revision {image.revision}"},
        entry(base, base_name, digest or UNKNOWN, "CONTAINER"),
    ]
    relations = [relation("SPDXRef-DOCUMENT", "DESCRIBES", root), relation(root, "DESCENDANT_OF", base)]
    for package in packages:
        name = re.sub(r"[^A-Za-z0-9.-]", "-", f"{package.kind}-{package.name.replace('+', '-plus')}")
        entries.append(package_entry(f"SPDXRef-{name}", package))
        relations.append(relation(root, "CONTAINS", f"SPDXRef-{name}"))
    texts = {
        name: package.license_text
        for package in packages
        for name in re.findall(r"LicenseRef-[A-Za-z0-9.-]+", package.license)
    }
    text = json.dumps([created, entries, relations])
    return {
        "spdxVersion": "SPDX-2.3",
        "dataLicense": "CC0-1.0",
        "SPDXID": "SPDXRef-DOCUMENT",
        "name": f"k25-train-{image.version}",
        "documentNamespace": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, text)}",
        "creationInfo": {"created": created, "creators": [f"Tool: k25-train-sbom-{image.version}"]},
        "packages": entries,
        "relationships": relations,
        "hasExtractedLicensingInfos": [
            {"licenseId": name, "extractedText": content} for name, content in sorted(texts.items())
        ],
    }


def entry(identifier: str, name: str, version: str, purpose: str) -> dict[str, Any]:
    """Fields that every package has."""
    return {
        "SPDXID": identifier,
        "name": name,
        "versionInfo": version,
        "downloadLocation": UNKNOWN,
        "filesAnalyzed": False,
        "licenseConcluded": UNKNOWN,
        "licenseDeclared": UNKNOWN,
        "copyrightText": UNKNOWN,
        "primaryPackagePurpose": purpose,
    }


def package_entry(identifier: str, package: Package) -> dict[str, Any]:
    """A package as SPDX has it."""
    found = entry(identifier, package.name, package.version, "LIBRARY")
    found["licenseDeclared"] = package.license
    found["supplier"] = f"Organization: {package.supplier}" if package.supplier else UNKNOWN
    found["externalRefs"] = [
        {
            "referenceCategory": "PACKAGE-MANAGER",
            "referenceType": "purl",
            "referenceLocator": package.purl,
        }
    ]
    if package.license_note:
        found["licenseComments"] = package.license_note
    if package.sha256:
        found["checksums"] = [{"algorithm": "SHA256", "checksumValue": package.sha256}]
    return found


def relation(left: str, kind: str, right: str) -> dict[str, str]:
    """How two elements relate."""
    return {"spdxElementId": left, "relationshipType": kind, "relatedSpdxElement": right}


def main(words: Sequence[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Write the bill of materials of this image.")
    parser.add_argument("out", type=Path)
    for name in ("--version", "--revision", "--base"):
        parser.add_argument(name, required=True)
    parser.add_argument("--lock", type=Path, required=True)
    parser.add_argument("--created", type=int, required=True)
    given = parser.parse_args(words)
    image = Image(version=given.version, revision=given.revision, base=given.base, created=given.created)
    packages = [*python_packages(distributions(), locked_hashes(given.lock)), *debian_packages()]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(document(image, packages), indent=1) + "\n", encoding="utf-8")
    print(f"{given.out}: {len(packages)} packages")


if __name__ == "__main__":
    main(sys.argv[1:])
