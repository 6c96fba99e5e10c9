"""Every config that a page shows to be copied is one that `jlora train` would take."""

import re
from pathlib import Path

import pytest
import yaml

from jlora.config import load_config
from jlora.config.reading import variants

pytestmark = pytest.mark.prose

ROOT = Path(__file__).parent.parent
BLOCKS = [
    pytest.param(block, id=f"{page.name}-{i}")
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for i, block in enumerate(re.findall(r"^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.M))
    if re.search(r"^output_dir:", block, re.MULTILINE)
]


@pytest.mark.parametrize("block", BLOCKS)
def test_config_is_valid(block, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(block, encoding="utf-8")
    cfg = load_config(path)
    assert len(variants(cfg)) == len(yaml.safe_load(block).get("sweep", ()))


def test_the_cookbook_has_its_ten():
    page = (ROOT / "docs" / "cookbook.md").read_text(encoding="utf-8")
    assert len(re.findall(r"^## ", page, re.MULTILINE)) == 10 == len([p for p in BLOCKS if p.id.startswith("cookbook")])


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1500
