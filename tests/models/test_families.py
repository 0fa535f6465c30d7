import pytest

from gradot_jax.errors import InputError
from gradot_jax.models.families import FAMILIES, read_config
from gradot_jax.models.family import channel_count
from gradot_jax.models.opt.config import OPTConfig


def test_the_family_is_chosen_by_model_type_and_reads_its_own_configuration():
    config = OPTConfig(num_hidden_layers=3, ffn_dim=100)
    assert read_config(config.to_hf()) == config
    assert config.family in FAMILIES and config.to_hf()["model_type"] in config.family.model_types


@pytest.mark.parametrize("values", [{}, {"model_type": None}, {"model_type": "bert"}])
def test_a_family_that_is_not_read_is_refused_with_those_that_are(values):
    with pytest.raises(InputError, match=r"^here: model_type is .*, expected 'opt'"):
        read_config(values, "here")


def test_channels_are_counted_without_arrays():
    assert channel_count(OPTConfig(hidden_size=12 * 2**20, ffn_dim=7)) == 7
