"""What is installed: one package, one command, its data files; what is shipped names nobody's machine."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wheel and sdist of the checkout."""
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("not a checkout")
    out = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(out), str(ROOT)], check=True, capture_output=True)
    return out


def test_the_wheel_holds_the_package_with_its_data_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"medseg_gym", "medseg_gym-0.1.0.dist-info"}
    assert "medseg_gym/py.typed" in names
    assert any(name.endswith("report.html.j2") for name in names)
    assert not any("__pycache__" in name or "/tests/" in name for name in names)
    assert wheel.stat().st_size < 12_000_000


def test_the_sdist_has_no_links(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        assert not [member.name for member in archive if member.issym() or member.islnk()]
        top = {member.name.split("/")[1] for member in archive if "/" in member.name}
    assert "envs" not in top and "policies" not in top and "medseg_gym" in top


def test_installed_alone_it_is_one_name_in_site_packages_and_a_command(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    target = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), str(wheel)], check=True
    )
    assert {p.name for p in target.iterdir()} - {"bin"} == {"medseg_gym", "medseg_gym-0.1.0.dist-info"}
    script = shutil.which("medseg-gym", path=str(target / "bin"))
    assert script is not None
    done = subprocess.run([sys.executable, script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "medseg-gym 0.1.0"


def test_constraints_pin_every_direct_requirement() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {
        re.split("==", line)[0].lower().replace("_", "-")
        for file in ("constraints.txt", "constraints-parity.txt", "constraints-vllm.txt")
        for line in (ROOT / file).read_text().splitlines()
        if "==" in line
    }
    pinned |= {"vllm"} & {name.removesuffix("-cpu") for name in pinned}  # the tests run its build for CPUs
    extras = project["optional-dependencies"].values()
    wanted = [*project["dependencies"], *(requirement for extra in extras for requirement in extra)]
    for requirement in wanted:
        name = re.match(r"[A-Za-z0-9_.-]+", requirement)
        assert name is not None
        assert name[0].lower().replace("_", "-") in pinned, requirement


def test_no_tracked_text_names_a_machines_paths() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    needles = ["/" + "work/", "/" + "root/", "/" + "home/"]
    for name in listed.splitlines():
        file = ROOT / name
        if file.suffix in {".py", ".md", ".toml", ".txt", ".json", ".j2", ".yml", ""} and file.is_file():
            text = file.read_text(encoding="utf-8", errors="ignore")
            assert not [n for n in needles if n in text], name
