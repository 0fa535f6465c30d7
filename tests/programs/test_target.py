import math

import pytest

from gradot_jax.errors import InputError
from gradot_jax.programs.target import CHIPS, gpu_config, parse_target


@pytest.mark.parametrize(
    ("name", "chip", "count"),
    [
        ("v5e:2x4", "v5e", 8),
        ("v5e:4x4", "v5e", 16),
        ("v5p:2x2x2", "v5p", 8),
        ("v4:2x2x4", "v4", 16),
        ("v6e:2x4", "v6e", 8),
        ("h100", "h100", 1),
        ("h100x8", "h100", 8),
        ("h200x4", "h200", 4),
        ("a100x8", "a100", 8),
    ],
)
def test_a_target_is_chips_of_one_kind(name, chip, count):
    target = parse_target(name)
    assert (target.chip, target.count) == (CHIPS[chip], count)


@pytest.mark.parametrize(
    "name", ["", "v5e", "v5e:", "v5e:8", "v5e:0x4", "v9:2x2", "h1", "tpu", "v5e:2x4 ", "h100x-1"]
)
def test_another_name_is_refused_with_what_there_is(name):
    with pytest.raises(InputError, match=r"v5e:2x4.*v6e.*h100x8.*h200"):
        parse_target(name)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v5e:2x2x2", "slices of v5e have 2 sides, such as v5e:2x2"),
        ("v5p:2x2", "slices of v5p have 3 sides, such as v5p:2x2x2"),
        ("h100x16", "expected 1 to 8 GPUs"),
        ("h100x0", "expected 1 to 8 GPUs"),
    ],
)
def test_chips_that_do_not_go_together_are_refused_with_what_would(name, said):
    with pytest.raises(InputError, match=f"--target {name}: .*{said}"):
        parse_target(name)


def test_capitals_do_not_matter():
    assert parse_target("H100x2") == parse_target("h100x2")


def test_a_gpu_is_described_to_its_compiler_as_text():
    text = gpu_config(CHIPS["h100"])
    assert "core_count: 132 " in text and "device_memory_size: 84942979072" in text
    assert "cuda_compute_capability { major: 9 minor: 0 }" in text
    assert text.count("{") == text.count("}") == 3
    # 4 matrix units a core, 512 products and sums a clock each: the published peak is theirs.
    peak = 132 * 4 * 1024 * 1.83e9
    assert math.isclose(CHIPS["h100"].flops, peak, rel_tol=0.01)
