"""Entry points: a package adds a dataset and a tool, pairs with them are ids, and nothing is loaded before use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = '''
"""A dataset of one image and a tool."""
import sys
import numpy as np
from medseg_gym.tools.stub import Stub
from medseg_gym.types import Sample

class Tiny:
    structures = ("dot",)
    name = "Tiny"
    def __init__(self, side=16):
        self.side = side
    def keys(self, split, structures=()):
        return ("Tiny/1/dot",)
    def __getitem__(self, key):
        image, target = np.zeros((self.side, self.side, 3), np.uint8), np.zeros((self.side, self.side), bool)
        target[4:8, 4:8] = True
        return Sample(key=key, image=image, target=target, structure="dot", instruction="dot", patient="1",
                      spacing_mm=None)

def own_stub(**options):
    return Stub(**options)

nothing = 3
def broken():
    return "no dataset"
'''
POINTS = """
[medseg_gym.datasets]
Tiny = addon_of_test:Tiny
BTCV = addon_of_test:Tiny
Broken = addon_of_test:broken
Gone = addon_of_test:gone
Bad-Name = addon_of_test:Tiny
[medseg_gym.tools]
OwnStub = addon_of_test:own_stub
Stub = addon_of_test:own_stub
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with an installed package."""
    (tmp_path / "addon_of_test.py").write_text(PACKAGE)
    info = tmp_path / "addon_of_test-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: addon-of-test\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(POINTS)
    return tmp_path


def run(site: Path, home: Path, code: str) -> str:
    start = f"import sys; sys.path.insert(0, {str(site)!r})\n"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", start + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_added_datasets_and_tools_are_ids_with_every_partner(site: Path, home: Path) -> None:
    out = run(
        site,
        home,
        "import medseg_gym, gymnasium as gym\n"
        "assert 'addon_of_test' not in sys.modules\n"
        "for name in ('Tiny-GrabCut', 'Tiny-OwnStub', 'BTCV-OwnStub', 'Phantom-OwnStub'):\n"
        "    gym.spec(f'MedSeg-{name}-v0')\n"
        "assert not any('Bad-Name' in name for name in gym.registry)\n"
        "from medseg_gym.registration import added, catalogue\n"
        "ids = [name for name, _, _ in [*catalogue(), *added()]]\n"
        "assert len(ids) == len(set(ids)) == sum(name.startswith('MedSeg-') for name in gym.registry) - 1\n"
        "env = gym.make('MedSeg-Tiny-OwnStub-v0', size=32, dataset_options={'side': 24})\n"
        "obs, info = env.reset(seed=0)\n"
        "print(info['key'], env.unwrapped.view().image.shape, env.unwrapped.name)\n",
    )
    assert out == "Tiny/1/dot (24, 24, 3) MedSeg-Tiny-Stub-v0\n"


def test_names_of_the_catalogue_stay_the_catalogues(site: Path, home: Path) -> None:
    out = run(
        site,
        home,
        "import medseg_gym\n"
        "from medseg_gym import datasets, tools\n"
        "assert not datasets.available('BTCV')\n"
        "try:\n"
        "    datasets.load('BTCV')\n"
        "except FileNotFoundError:\n"
        "    print('missing')\n"
        "tools.load('Stub')\n"
        "print('addon_of_test' in sys.modules, datasets.available('Tiny'), tools.available('OwnStub'))\n",
    )
    assert out == "missing\nFalse True True\n"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Broken", "Broken gave 'no dataset'; wanted a Dataset"),
        ("Gone", "'Gone' of the group medseg_gym.datasets is 'addon_of_test:gone'"),
        ("Tinny", "unknown dataset 'Tinny'; did you mean 'Tiny'"),
    ],
)
def test_what_goes_wrong_is_told(site: Path, home: Path, name: str, message: str) -> None:
    code = (
        "from medseg_gym import datasets\nfrom medseg_gym.errors import MedSegError\n"
        f"try:\n    datasets.load({name!r})\nexcept MedSegError as error:\n    print(error)\n"
    )
    assert message in run(site, home, code)


def test_the_list_names_them(site: Path, home: Path) -> None:
    out = run(site, home, "from medseg_gym.cli_data import app\napp(['list'], standalone_mode=False)\n")
    assert any(line.split()[:2] == ["Tiny", "(another"] for line in out.splitlines())
