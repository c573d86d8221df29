"""podman, docker, kubectl and apptainer for tests: `fake_engine.py PROGRAM STATE ARGUMENTS…`.

A container, pod or instance is a folder of STATE; what runs in it runs in bubblewrap, which shows its
`work` and others. Every call is a line of STATE/calls. A word that is not known ends it with 64.
"""

import json
import os
import shutil
import sys
from pathlib import Path

STATE = Path(sys.argv[2]) if len(sys.argv) > 2 else Path()


def create(name: str, places: list[str]) -> None:
    """A new one."""
    for place in places:
        (STATE / "all" / name / place.strip("/")).mkdir(parents=True)


def run_inside(name: str, command: list[str]) -> None:
    """Become what runs in one."""
    folder = STATE / "all" / name
    if not folder.is_dir():
        sys.exit(f"Error: {name} is not there")
    options = ["bwrap", "--die-with-parent", "--dev", "/dev", "--proc", "/proc", "--uid", "65534"]
    options += ["--unshare-user", "--unshare-net"]
    for shown in ("/usr", "/lib", "/lib64", "/bin", "/etc"):
        options += ["--ro-bind", shown, shown]
    for place in folder.iterdir():
        options += ["--bind", str(place), f"/{place.name}"]
    os.execvp("bwrap", [*options, *command])


def names() -> list[str]:
    """All."""
    return sorted(folder.name for folder in (STATE / "all").iterdir())


def containers(words: list[str]) -> None:
    """podman and docker."""
    if words[0] == "run":
        places = [words[at + 1].split(":")[0] for at, word in enumerate(words) if word == "--tmpfs"]
        create(words[words.index("--name") + 1], places)
    elif words[:2] == ["exec", "--interactive"]:
        run_inside(words[2], words[3:])
    elif words[:3] == ["rm", "--force", "--volumes"]:
        shutil.rmtree(STATE / "all" / words[3], ignore_errors=True)
    elif words[0] == "ps":
        print("\n".join(names()))
    else:
        sys.exit(64)


def pods(words: list[str]) -> None:
    """kubectl."""
    if words[:3] in (["create", "-f", "-"], ["apply", "-f", "-"]):
        manifest = json.load(sys.stdin)
        (STATE / f"{manifest['kind']}.json").write_text(json.dumps(manifest), encoding="utf-8")
        if manifest["kind"] == "Pod":
            (container,) = manifest["spec"]["containers"]
            create(manifest["metadata"]["name"], [each["mountPath"] for each in container["volumeMounts"]])
    elif words[0] == "wait":
        sys.exit(words[2].removeprefix("pod/") not in names())
    elif words[:2] == ["exec", "--stdin"]:
        run_inside(words[2], words[4:])
    elif words[:2] == ["delete", "pod"]:
        shutil.rmtree(STATE / "all" / words[2], ignore_errors=True)
    elif words[:2] == ["get", "pods"]:
        print("\n".join(f"pod/{name}" for name in names()))
    elif words[:2] == ["get", "pod"] and words[2] in names():
        print("Running", end="")
    elif words[:2] == ["get", "pod"]:
        sys.exit(f'Error from server (NotFound): pods "{words[2]}" not found')
    else:
        sys.exit(64)


def instances(words: list[str]) -> None:
    """apptainer."""
    if words[:2] == ["instance", "start"]:
        places = [words[at + 1] for at, word in enumerate(words) if word == "--scratch"]
        create(words[-1], places)
    elif words[:2] == ["exec", "--cleanenv"]:
        run_inside(words[2].removeprefix("instance://"), words[3:])
    elif words[:3] == ["instance", "stop", "--force"]:
        sys.exit(shutil.rmtree(STATE / "all" / words[3], ignore_errors=True))
    elif words[:3] == ["instance", "list", "--json"]:
        print(json.dumps({"instances": [{"instance": name} for name in names()]}))
    else:
        sys.exit(64)


def install(program: str, state: Path, folder: Path) -> None:
    """Put one into a folder of programs."""
    (state / "all").mkdir(parents=True, exist_ok=True)
    folder.mkdir(exist_ok=True)
    file = folder / program
    call = f'exec {sys.executable} -I -S {__file__} {program} {state} "$@"'
    file.write_text(f"#!/bin/sh\n{call}\n", encoding="utf-8")
    file.chmod(0o755)


def main() -> None:
    """See the head of this file."""
    program, words = sys.argv[1], sys.argv[3:]
    with (STATE / "calls").open("a", encoding="utf-8") as calls:
        calls.write(json.dumps([program, *words]) + "\n")
    {"podman": containers, "docker": containers, "kubectl": pods, "apptainer": instances}[program](words)


if __name__ == "__main__":
    main()
