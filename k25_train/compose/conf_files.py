"""The files of `conf/`, composed by hydra: which file of each group comes first is for their
defaults lists to say.

hydra gets choices of groups and nothing else. Values of the files stay texts (`yaml_files`), and those of the
command line are applied afterwards (`overrides`), so neither hydra nor YAML guesses at types.
"""

import copy
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.compose import compose as hydra_compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from k25_train.compose.values import NULL
from k25_train.compose.yaml_files import read_file
from k25_train.errors import ConfigError

PACKAGE = Path(__file__).resolve().parents[1]
CONF_DIR = next(path for path in (PACKAGE / "conf", PACKAGE.parent / "conf") if path.is_dir())
"""Folder of the YAML files: inside the package in a wheel, next to it in a checkout."""
CONFIG_NAME = "train"
"""The primary config file."""
CHAINS = "chain"
"""Folder of `conf/` that is no group: chains of experiments (`k25_train/recipes`)."""
DEVICE = "device"
"""The group whose files a cluster names: they go to `cluster.rates`."""


class TextFiles(FileConfigSource):
    """hydra's files, with scalars that stay texts."""

    @staticmethod
    def scheme() -> str:
        """What search paths of such files start with."""
        return "k25-texts"

    def load_config(self, config_path: str) -> ConfigResult:
        """One file. Raises `ConfigError` if it cannot be read."""
        path = Path(self.path, self._normalize_file_name(config_path))
        values = read_file(path)
        # A group without a choice: hydra's own lists have no texts.
        for choice in values.get("defaults", ()):
            if isinstance(choice, dict):
                choice.update({group: None for group, name in choice.items() if name == NULL})
        header = self._get_header_dict(path.read_text(encoding="utf-8-sig"))
        return ConfigResult(
            config=OmegaConf.create(values), path=self.full_path(), provider=self.provider, header=header
        )


def group_choices() -> dict[str, list[str]]:
    """Config group -> its choices, from the files of `conf/`."""
    groups = sorted(path for path in CONF_DIR.iterdir() if path.is_dir() and path.name != CHAINS)
    return {group.name: sorted(file.stem for file in group.glob("*.yaml")) for group in groups}


def group_values(group: str, path: Path) -> dict[str, Any]:
    """The values of one file of a group, over those that all choices of the group share (`train.yaml`)."""
    return {**read_file(CONF_DIR / f"{CONFIG_NAME}.yaml").get(group, {}), **read_file(path)}


def compose_files(choices: Mapping[str, str], files: Mapping[str, Path]) -> dict[str, Any]:
    """The values that the chosen file of each group gives, as texts; a group left out has its default.

    Args:
        choices: group -> name of a file of `conf/`, or of a file of the user's.
        files: group -> file of the user's. Its keys go over those that all choices of the group share
            (`train.yaml`), in the place of what the experiment chose.

    Raises:
        ConfigError: a file cannot be read, or a defaults list leads nowhere.
    """
    named = tuple(item for item in choices.items() if item[0] not in files and item[0] != DEVICE)
    values = copy.deepcopy(_composed(CONF_DIR, named))
    for group, path in files.items():
        if group != DEVICE:
            values[group] = group_values(group, path)
    values["cluster"]["rates"] = _rates(values["cluster"], choices, files)
    return values


def _rates(cluster: Mapping[str, Any], choices: Mapping[str, str], files: Mapping[str, Path]) -> object:
    """The rates of the chosen device: of the command line, or else of the cluster, which names it or has them
    all."""
    if DEVICE in files:
        return read_file(files[DEVICE])
    known = group_choices()[DEVICE]
    chosen = choices.get(DEVICE, cluster.get("rates"))
    if chosen is None or (isinstance(chosen, str) and chosen not in known):
        where = files.get("cluster", f"cluster {cluster.get('name')}")
        raise ConfigError(
            f"cluster.rates={chosen or 'null'}: {where} must say which device its nodes have\n"
            f"  -> write rates: NAME, one of {', '.join(known)}, or choose device=NAME or device=FILE.yaml"
        )
    return read_file(CONF_DIR / DEVICE / f"{chosen}.yaml") if isinstance(chosen, str) else chosen


def choice_values(group: str, name: str) -> dict[str, Any]:
    """The values of one choice of a group by itself, as texts, with those of the choices that it is based on.

    Raises:
        ConfigError: a file cannot be read, or a defaults list leads nowhere.
    """
    return copy.deepcopy(cast(dict[str, Any], _composed(CONF_DIR, (), f"{group}/{name}")[group]))


@lru_cache(maxsize=128)
def _composed(
    folder: Path, choices: tuple[tuple[str, str], ...], primary: str = CONFIG_NAME
) -> dict[str, Any]:
    Plugins.instance().register(TextFiles)
    overrides = [f"{group}={choice}" for group, choice in choices]
    GlobalHydra.instance().clear()
    try:
        Hydra.create_main_hydra2("k25", create_config_search_path(f"{TextFiles.scheme()}://{folder}"))
        composed = hydra_compose(primary, overrides)
        return cast(dict[str, Any], OmegaConf.to_container(composed))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"{' '.join(overrides)}: the files of {folder} do not fit: {error}") from error
    finally:
        GlobalHydra.instance().clear()
