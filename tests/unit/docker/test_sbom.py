"""The bill of materials: SPDX's own library accepts it, and it names what is installed."""

import json
import os
import re
import sys
from email.message import Message
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any, cast

import pytest
from spdx_tools.spdx.model import Document, RelationshipType
from spdx_tools.spdx.parser.jsonlikedict.json_like_dict_parser import JsonLikeDictParser
from spdx_tools.spdx.validation.document_validator import validate_full_spdx_document

from tests.helpers.image_files import DOCKER, script, stand_in

sbom, installed = script("sbom"), script("installed")
LOCK = installed.locked_hashes(DOCKER / "pins.lock")
BASE = f"docker.io/library/debian:trixie@sha256:{'a' * 64}"
IMAGE = sbom.Image(version="1.2", revision="0123abc", base=BASE, created=1_700_000_000)
DPKG = r"%s\t%s\t%s\t%s\tA Person <a@example.org>"
NEWLINE = r"\n"
"""Both as printf reads them."""


def a_package(**values: str) -> Any:
    """A package as simple as can be."""
    plain = {
        "kind": "python",
        "name": "a",
        "version": "1",
        "purl": "pkg:pypi/a@1",
        "license": "MIT",
        "license_note": "",
        "supplier": "",
        "sha256": "",
    }
    return sbom.Package(**(plain | values))


def faults(document: dict[str, Any]) -> list[str]:
    """What SPDX's library finds."""
    parsed: Document = JsonLikeDictParser().parse(json.loads(json.dumps(document)))
    return [each.validation_message for each in validate_full_spdx_document(parsed)]


@pytest.fixture(scope="module")
def packages() -> list[Any]:
    """The packages of this environment."""
    found: list[Any] = installed.python_packages(distributions(), LOCK)
    return found


def test_the_bill_of_this_environment_is_valid(packages: list[Any]) -> None:
    document = sbom.document(IMAGE, packages)
    assert faults(document) == []
    parsed: Document = JsonLikeDictParser().parse(document)
    described = [
        each for each in parsed.relationships if each.relationship_type is RelationshipType.DESCRIBES
    ]
    assert [each.related_spdx_element_id for each in described] == ["SPDXRef-image"]
    contained = {
        each.related_spdx_element_id
        for each in parsed.relationships
        if each.relationship_type is RelationshipType.CONTAINS
    }
    assert contained == {each.spdx_id for each in parsed.packages} - {"SPDXRef-image", "SPDXRef-base"}
    (image,) = [each for each in parsed.packages if each.spdx_id == "SPDXRef-image"]
    assert (image.version, image.comment) == ("1.2", "revision 0123abc")
    (torch,) = [each for each in parsed.packages if each.name == "torch"]
    assert torch.external_references[0].locator.startswith("pkg:pypi/torch@2.13.0")
    # The hash of the wheel for this Python, among those that may be installed.
    assert torch.checksums[0].value in LOCK["torch"].values()


@pytest.mark.parametrize(
    "package",
    [
        a_package(license="Not A License"),
        a_package(sha256="00"),
        a_package(purl="pypi/a 1"),
        a_package(license="LicenseRef-Own", kind="python", license_text=""),
    ],
    ids=["license", "hash", "purl", "own license"],
)
def test_a_wrong_bill_is_found(package: Any) -> None:
    """So the test above can fail."""
    assert faults(sbom.document(IMAGE, [a_package()])) == []
    document = sbom.document(IMAGE, [package])
    if package.license.startswith("LicenseRef"):
        document.pop("hasExtractedLicensingInfos")
    try:
        assert faults(document) != []
    except Exception as error:  # the parser's own types
        assert "Error" in type(error).__name__


def test_hashes_are_of_the_file_that_was_installed(packages: list[Any]) -> None:
    of_this_python = {each.name: each.sha256 for each in packages}
    tag = f"cp3{sys.version_info.minor}"
    wheels = {name: digest for name, digest in LOCK["numpy"].items() if f"-{tag}-" in name}
    assert [of_this_python["numpy"]] == list(wheels.values())
    assert of_this_python["antlr4-python3-runtime"] in LOCK["antlr4-python3-runtime"].values()
    # Not in the image, so its origin is not known.
    assert of_this_python["pytest"] == ""


def distribution(**headers: str | list[str]) -> Distribution:
    """A Python package with this metadata."""
    message = Message()
    for name, values in {"Name": "a", "Version": "1", **headers}.items():
        for value in [values] if isinstance(values, str) else values:
            message[name.replace("_", "-")] = value

    class Made(Distribution):
        metadata = cast(Any, message)
        files = None

        def read_text(self, filename: str) -> str | None:
            return None

        def locate_file(self, path: Any) -> Any:
            return path

    return Made()


@pytest.mark.parametrize(
    ("headers", "expression"),
    [
        ({"License_Expression": "Apache-2.0 OR MIT"}, "Apache-2.0 OR MIT"),
        ({"License": "MIT License"}, "MIT"),
        ({"License": "MPL-2.0 AND MIT"}, "MPL-2.0 AND MIT"),
        ({"License": "see LICENSE"}, "NOASSERTION"),
        ({"Classifier": ["License :: OSI Approved :: MIT License"]}, "MIT"),
        ({"Classifier": ["License :: OSI Approved :: MIT License", "License :: Other"]}, "MIT"),
        ({"Classifier": ["License :: OSI Approved :: Sleepycat License"]}, "NOASSERTION"),
        ({}, "NOASSERTION"),
    ],
)
def test_a_license_is_only_claimed_if_it_is_stated(headers: dict[str, Any], expression: str) -> None:
    assert installed.license_of(distribution(**headers))[0] == expression


def test_what_a_package_says_itself_is_kept() -> None:
    found = installed.license_of(distribution(License="Our own terms\nline 2"))
    assert found == ("NOASSERTION", "Our own terms")


def test_debian_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        DPKG % ("installed", "g++", "4:14.2.0-1+b1", "amd64"),
        DPKG % ("config-files", "gone", "1", "amd64"),
        DPKG % ("installed", "perl", "5.40~rc1", "all"),
    ]
    stand_in(tmp_path, "dpkg-query", f"printf '%b' '{NEWLINE.join(lines)}'")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    release = tmp_path / "os-release"
    release.write_text('ID=debian\nVERSION_ID="13"\n')
    (tmp_path / "g++").mkdir()
    (tmp_path / "g++" / "copyright").write_text(
        "Format: https://x\n\nFiles: *\nLicense: GPL-3+\n text\nLicense: GPL-3+\n"
    )
    (tmp_path / "perl").mkdir()
    (tmp_path / "perl" / "copyright").write_text("This is free.\n")
    found = installed.debian_packages(release, tmp_path)
    assert [each.purl for each in found] == [
        "pkg:deb/debian/g%2B%2B@4:14.2.0-1%2Bb1?arch=amd64&distro=debian-13",
        "pkg:deb/debian/perl@5.40~rc1?arch=all&distro=debian-13",
    ]
    assert [each.license_note for each in found] == [
        "Debian's names: GPL-3+",
        f"see {tmp_path / 'perl' / 'copyright'}",
    ]
    assert faults(sbom.document(IMAGE, found)) == []


def test_the_same_image_has_the_same_bill_and_another_has_another_name(packages: list[Any]) -> None:
    first, again = (sbom.document(IMAGE, packages) for _ in range(2))
    assert first == again
    assert first["creationInfo"]["created"] == "2023-11-14T22:13:20Z"
    assert sbom.document(IMAGE, packages[1:])["documentNamespace"] != first["documentNamespace"]


def test_the_base_is_named_with_its_digest() -> None:
    document = sbom.document(IMAGE, [])
    (base,) = [each for each in document["packages"] if each["SPDXID"] == "SPDXRef-base"]
    assert base["name"] == "docker.io/library/debian:trixie"
    assert re.fullmatch(r"sha256:a{64}", base["versionInfo"])
