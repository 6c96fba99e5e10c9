"""The checks that every test runs under are on, and what jlora is installed with."""

import tomllib
from pathlib import Path

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from jlora.model.layers import rms_norm

ROOT = Path(__file__).parent.parent


def test_shapes_are_those_of_the_annotations():
    """NumPy's rules would compute it: what is wrong is one dim too few."""
    with pytest.raises(TypeCheckError, match=r"B T \*heads D"):
        rms_norm(jnp.ones((3, 4)), jnp.ones(4), 1e-5)


def test_no_version_with_a_known_hole_is_admitted():
    """Jinja2's sandbox could be left before 3.1.6; sentencepiece read beyond a damaged model before 0.2.1."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = {need.name: need.specifier for need in map(Requirement, project["dependencies"])}
    assert "3.1.5" not in wanted["jinja2"] and "0.2.0" not in wanted["sentencepiece"]
    assert all(any(each.operator == ">=" for each in specifier) for specifier in wanted.values())
    for name in ("constraints.txt", "constraints-py312.txt"):
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        tested = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
        tested = {canonicalize_name(package): version for package, version in tested.items()}
        assert all(tested[canonicalize_name(package)] in specifier for package, specifier in wanted.items())
