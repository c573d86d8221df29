"""The rates of a device: by the cluster's file, by name on the command line, by a file of the user's."""

from pathlib import Path

import pytest
import yaml

from k25_train.compose.conf_files import CONF_DIR
from k25_train.compose.resolve import compose, group_choices
from k25_train.errors import ConfigError

REAL = "experiment=k25_pretrain_4k"


def own_cluster(folder: Path, **changes: object) -> str:
    """An override with a cluster's file as a user writes one; keys that are None are left out."""
    values = yaml.safe_load((CONF_DIR / "cluster/local_gpu.yaml").read_text()) | changes
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value != ()}))
    return f"cluster={path}"


def test_a_device_by_name_is_that_of_its_file() -> None:
    assert compose([REAL]).cluster.rates.device == "H800"
    assert compose([REAL, "device=h100"]).cluster.rates.device == "H100"
    assert compose([REAL, "device=h100"]).cluster.name == "h800_roce"


def test_a_value_of_a_device_is_an_override() -> None:
    assert compose([REAL, "cluster.rates.memory_gb=141"]).cluster.gpu_memory_gb == 141


def test_a_file_of_the_users_goes_over_what_the_cluster_has(tmp_path: Path) -> None:
    values = yaml.safe_load((CONF_DIR / "device/h800.yaml").read_text()) | {"device": "H20"}
    path = tmp_path / "h20.yaml"
    path.write_text(yaml.safe_dump(values))
    assert compose([REAL, f"device={path}"]).cluster.rates.device == "H20"
    both = compose(["experiment=smoke_1gpu", f"device={path}", own_cluster(tmp_path)])
    assert both.cluster.rates.device == "H20"


def test_a_cluster_of_the_users_names_its_device_or_has_its_rates(tmp_path: Path) -> None:
    smoke = ["experiment=smoke_1gpu"]
    named = compose([*smoke, own_cluster(tmp_path, rates="h100")])
    assert named.cluster.rates.device == "H100"
    written = yaml.safe_load((CONF_DIR / "device/h800.yaml").read_text()) | {"device": "H20"}
    assert compose([*smoke, own_cluster(tmp_path, rates=written)]).cluster.rates.device == "H20"
    # A choice on the command line counts more than what the file names.
    assert (
        compose([*smoke, "device=h800", own_cluster(tmp_path, rates="h100")]).cluster.rates.device == "H800"
    )


@pytest.mark.parametrize("rates", [(), None, "h9000"])
def test_a_cluster_without_a_known_device_is_refused(tmp_path: Path, rates: object) -> None:
    with pytest.raises(ConfigError, match=r"mine\.yaml must say which device.*\n.*rates: NAME, one of"):
        compose(["experiment=smoke_1gpu", own_cluster(tmp_path, rates=rates)])


@pytest.mark.parametrize("key", ["cluster.model_tflops", "cluster.gpu_memory_gb", "data.blend"])
def test_a_key_of_earlier_versions_is_told_by_what_says_it_now(key: str) -> None:
    with pytest.raises(ConfigError, match=r"was a key of earlier versions\n.*says it now"):
        compose([REAL, f"{key}=1"])


@pytest.mark.parametrize("device", group_choices()["device"])
def test_every_device_composes(device: str) -> None:
    rates = compose([REAL, f"device={device}", "cluster.rates.memory_gb=80"]).cluster.rates
    assert rates.device.lower() == device
