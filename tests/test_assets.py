"""The asset folders: found in a checkout and in an installation alike, and nothing outside them."""

from __future__ import annotations

from pathlib import Path

import pytest

from dagan_rt._assets import FOLDERS, asset, choose_root
from dagan_rt.errors import InputError

CHECKOUT = Path(__file__).resolve().parents[1]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A made-up checkout: the package and the asset folders side by side. Returns the package's folder."""
    for folder in ("dagan_rt", *FOLDERS):
        (tmp_path / folder).mkdir()
    return tmp_path / "dagan_rt"


def test_finds_a_file_of_the_checkout():
    assert asset("kernels", "README.md").read_bytes() == (CHECKOUT / "kernels" / "README.md").read_bytes()
    assert asset("export").is_dir()


def test_the_installed_folder_wins_over_the_checkout(checkout: Path):
    assert choose_root(checkout) == checkout.parent
    for folder in FOLDERS:
        (checkout / "assets" / folder).mkdir(parents=True)
    assert choose_root(checkout) == checkout / "assets"


def test_a_missing_folder_is_named(checkout: Path):
    (checkout.parent / "train").rmdir()
    with pytest.raises(InputError, match=r"train is missing: install dagan-rt again"):
        choose_root(checkout)


def test_a_missing_file_is_named():
    with pytest.raises(InputError, match=r"asset 'train/recipes/absent.toml' must exist"):
        asset("train", "recipes", "absent.toml")


@pytest.mark.parametrize("parts", [(), ("tests",), ("train", "..", "setup.py"), ("train", "/etc/passwd"), ("..",)])
def test_nothing_outside_the_asset_folders_is_reached(parts: tuple[str, ...]):
    with pytest.raises(InputError, match="an asset must lie in one of kernels, export, train, benchmarks"):
        asset(*parts)
