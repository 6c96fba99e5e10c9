"""Names of hardware as clouds and people write them."""

import pytest

from jlora.errors import ConfigError
from jlora.planning.hardware import canonical
from jlora.planning.topology import resolve


@pytest.mark.parametrize(
    "spec, meant",
    [
        ("gpu:h100:2", "gpu:h100-80gb:2"),
        ("gpu:H100-80GB:1", "gpu:h100-80gb:1"),
        ("gpu:h100-80gb", "gpu:h100-80gb:1"),
        ("gpu:L4", "gpu:l4-24gb:1"),
        ("gpu:a10g:4", "gpu:a10g-24gb:4"),
        ("gpu:a6000:1", "gpu:rtxa6000-48gb:1"),
        ("gpu:3090:1", "gpu:rtx3090-24gb:1"),
        ("gpu:B200:8", "gpu:b200-180gb:8"),
        ("gpu:GB200", "gpu:gb200-186gb:1"),
        ("gpu:h100-nvl:2", "gpu:h100nvl-94gb:2"),
        ("gpu:H20", "gpu:h20-96gb:1"),
        ("gpu:h200", "gpu:h200-141gb:1"),
        ("gpu:a100-80:8", "gpu:a100-80gb:8"),
        ("gpu:GeForce RTX 5090", "gpu:rtx5090-32gb:1"),
        ("gpu:rtx-4090:2", "gpu:rtx4090-24gb:2"),
        ("gpu:L40S", "gpu:l40s-48gb:1"),
        ("gpu:My Card.yaml:2", "gpu:My Card.yaml:2"),
        ("v5litepod-8", "tpu:v5e:2x4"),
        ("v6e-256", "tpu:v6e:16x16"),
        ("tpu:v4-8", "tpu:v4:2x2x1"),  # eight cores, two a chip
        ("tpu:v5p-8", "tpu:v5p:2x2x1"),
        ("tpu:v5p:2x2x1", "tpu:v5p:2x2x1"),
        ("tpu:v5litepod:2x4", "tpu:v5e:2x4"),
        ("tpu:v6e", "tpu:v6e:1x1"),
        ("tpu7x-8", "tpu:v7x:2x2x1"),
        ("cpu:8", "cpu:8"),
        ("cpu", "cpu:1"),
    ],
)
def test_what_clouds_and_people_call_it_is_known(spec, meant):
    assert canonical(spec) == meant


@pytest.mark.parametrize(
    "spec, says",
    [
        ("gpu:a100:2", "gpu:a100-40gb:2 or gpu:a100-80gb:2"),
        ("gpu:h1000:2", "did you mean gpu:h100-80gb:2?"),
        ("tpu:v5ep:2x2x1", "did you mean tpu:v5p:2x2x1?"),
        ("cpu:²", "unknown topology"),
        ("cpu:٣", "unknown topology"),
        ("gpu:h100:²", "unknown topology 'gpu:h100-80gb:²'; did you mean gpu:h100-80gb:1?"),
        ("v4-7", "did you mean v4-8?"),
        ("v5litpod-8", "did you mean v5litepod-8?"),
        ("h100:2", "did you mean gpu:h100-80gb:2?"),
        ("gpu:l40:1", "did you mean gpu:l40s-48gb:1?"),
        ("abacus:2", "unknown topology"),
    ],
)
def test_what_is_not_known_is_named_with_the_nearest(spec, says):
    with pytest.raises(ConfigError) as refused:
        resolve(spec)
    assert says in str(refused.value)
    assert ("known are" in str(refused.value)) == ("did you mean" not in says and "gpu:a100" not in says)


@pytest.mark.parametrize("spec", ["gpu:mi300x:8", "MI300X", "gpu:amd-mi325x"])
def test_an_amd_card_is_refused_with_the_reason(spec):
    with pytest.raises(ConfigError, match="CUDA compiler, which knows no AMD card"):
        resolve(spec)
