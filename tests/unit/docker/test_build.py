"""docker/build.sh and apt.sh: refused bases and checkouts, arguments of the build, packages."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers.image_files import DOCKER, stand_in
from tests.helpers.project_sources import REPO

DIGEST = f"sha256:{'a' * 64}"
BASE = f"registry.example.org/debian:trixie@{DIGEST}"
GIT = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org"]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with docker/build.sh, and docker as a stand-in that keeps what it is told."""
    folder = tmp_path / "checkout"
    (folder / "docker").mkdir(parents=True)
    for name in ("docker/build.sh", "docker/Dockerfile", "setup.py"):
        shutil.copy(REPO / name, folder / name)
    (folder / ".gitignore").write_text("build\n")
    for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "a"]):
        date = {"GIT_COMMITTER_DATE": "2023-11-14T22:13:20Z"}
        subprocess.run([*GIT, *words], cwd=folder, check=True, env=os.environ | date)
    fake = f'printf "%s\\n" "$@" >{tmp_path}/$1; [ "$1" != run ] || echo bill'
    for tool in ("docker", "podman"):
        stand_in(tmp_path / tool, tool, fake)
    return folder


def build(
    checkout: Path, *words: str, tool: str = "docker", **environment: str
) -> "subprocess.CompletedProcess[str]":
    """Run build.sh."""
    path = f"{checkout.parent / tool}:/usr/bin:/bin"
    return subprocess.run(
        [str(checkout / "docker" / "build.sh"), *words],
        env={"PATH": path, "HOME": str(checkout.parent), "TOOL": tool} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def arguments(checkout: Path) -> dict[str, str]:
    """Build arguments that the tool was given."""
    words = (checkout.parent / "build").read_text().splitlines()
    given = [words[at + 1] for at, word in enumerate(words) if word == "--build-arg"]
    return dict(word.split("=", 1) for word in given)


def head(checkout: Path) -> str:
    """The commit."""
    return subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=checkout, text=True).strip()


@pytest.mark.parametrize("tool", ["docker", "podman"])
def test_the_image_is_told_what_it_is(tool: str, checkout: Path) -> None:
    done = build(checkout, BASE, "--no-cache", tool=tool)
    assert done.returncode == 0, done.stderr
    assert arguments(checkout) == {
        "BASE": BASE,
        "BASE_NAME": "registry.example.org/debian:trixie",
        "BASE_DIGEST": DIGEST,
        "ALLOW_TAG": "no",
        "REVISION": head(checkout),
        "VERSION": "0.1.0",
        "SOURCE_DATE_EPOCH": "1700000000",
        "CREATED": "2023-11-14T22:13:20Z",
    }
    words = (checkout.parent / "build").read_text().splitlines()
    assert "--no-cache" in words
    assert (checkout / "build" / "docker" / "k25-train.spdx.json").read_text() == "bill\n"


def test_it_is_built_from_the_commit_and_not_from_the_folder(checkout: Path) -> None:
    (checkout / "build").mkdir()
    assert build(checkout, BASE).returncode == 0
    context = (checkout.parent / "build").read_text().splitlines()[-1]
    assert Path(context) != checkout and not Path(context).exists()


@pytest.mark.parametrize(
    "base",
    [
        "debian:trixie-slim",
        "debian",
        "debian@sha256:abc",
        f"debian@sha512:{'a' * 64}",
        f"@{DIGEST}",
        f"debian@{DIGEST}0",
        f"debian@{DIGEST.upper()}",
    ],
)
def test_a_base_without_digest_is_refused(base: str, checkout: Path) -> None:
    done = build(checkout, base)
    assert done.returncode == 2
    assert f"BASE={base}: must be NAME@sha256:DIGEST" in done.stderr and "--allow-tag" in done.stderr
    assert not (checkout.parent / "build").exists()


def test_a_tag_can_be_allowed(checkout: Path) -> None:
    assert build(checkout, "--allow-tag", "debian:trixie").returncode == 0
    found = arguments(checkout)
    assert (found["BASE_NAME"], found["BASE_DIGEST"], found["ALLOW_TAG"]) == ("debian:trixie", "", "yes")
    # A digest with a slip is no tag.
    assert build(checkout, "--allow-tag", "debian@sha256:abc").returncode == 2


@pytest.mark.parametrize("change", ["setup.py", "mine.yaml"])
def test_a_checkout_with_changes_is_refused_or_marked(change: str, checkout: Path) -> None:
    with (checkout / change).open("a") as file:
        file.write("# more\n")
    done = build(checkout, BASE)
    assert done.returncode == 2
    assert change in done.stderr and "--allow-changes" in done.stderr
    assert build(checkout, "--allow-changes", BASE).returncode == 0
    assert arguments(checkout)["REVISION"] == f"{head(checkout)}, with local changes"


def test_no_checkout_no_image(checkout: Path) -> None:
    shutil.rmtree(checkout / ".git")
    done = build(checkout, BASE, GIT_CEILING_DIRECTORIES=str(checkout.parent))
    assert done.returncode == 2
    assert "git checkout" in done.stderr


@pytest.mark.parametrize("words", [[], ["--quiet", BASE]])
def test_usage(words: list[str], checkout: Path) -> None:
    assert build(checkout, *words).returncode == 2


def test_certificates_of_this_machine_are_a_secret(checkout: Path) -> None:
    assert build(checkout, BASE, CA_BUNDLE="/etc/own.pem").returncode == 0
    words = (checkout.parent / "build").read_text().splitlines()
    assert words[words.index("--secret") + 1] == "id=ca-bundle,src=/etc/own.pem"


def test_a_build_that_fails_writes_no_bill(checkout: Path) -> None:
    stand_in(checkout.parent / "docker", "docker", "exit 3")
    assert build(checkout, BASE).returncode == 3
    assert not (checkout / "build").exists()


def packages(folder: Path, *words: str, known: str) -> "subprocess.CompletedProcess[str]":
    """Run apt.sh with stand-ins of apt that know some packages; every path it would clean is another."""
    stand_in(folder, "apt-get", f'[ "$1" = install ] && printf "%s\\n" "$@" >{folder}/installed; true')
    stand_in(folder, "apt-cache", f'case " {known} " in *" $2 "*) ;; *) exit 100 ;; esac')
    for name in ("rm", "install", "tee"):
        stand_in(folder, name, "cat 2>/dev/null </dev/stdin || true" if name == "tee" else "true")
    command = [str(DOCKER / "apt.sh"), *words]
    environment = os.environ | {"PATH": f"{folder}:/usr/bin:/bin"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_what_the_base_has_is_not_installed_again(tmp_path: Path) -> None:
    done = packages(
        tmp_path,
        *("bash=bash", "/etc/passwd=passwd", "no-such-a=package-a", "--", "no-such-b=package-b"),
        *("no-such-c=package-c", "ls=coreutils"),
        known="package-c",
    )
    assert done.returncode == 0, done.stderr
    installed = (tmp_path / "installed").read_text().splitlines()
    assert [word for word in installed if not word.startswith("-")] == ["install", "package-a", "package-c"]
    assert "--no-upgrade" in installed and "--no-install-recommends" in installed
    # What an image lacks, it says.
    assert "no-such-b: no package package-b in the base's sources" in done.stdout


def test_nothing_to_install_is_no_fault(tmp_path: Path) -> None:
    assert packages(tmp_path, "bash=bash", "--", "ls=coreutils", known="").returncode == 0
    assert not (tmp_path / "installed").exists()
