import dataclasses

import pytest

from gradot_jax.errors import InputError
from gradot_jax.models.families import read_config
from gradot_jax.models.family import attention_windows, channel_count
from gradot_jax.models.llama.config import MODEL_TYPES

CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
SIZES = {
    "vocab_size": 23,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FULL, SLIDING = "full_attention", "sliding_attention"
WINDOW = {"use_sliding_window": True, "sliding_window": 5}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8}
SCALINGS = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "llama3": {"factor": 4.0, **LLAMA3},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 16.0},
}


def values_of(model_type="llama", **changes):
    architectures = [f"{CLASSES[model_type]}ForCausalLM"]
    return {"model_type": model_type, "architectures": architectures, **SIZES, **changes}


def read(model_type="llama", **changes):
    return read_config(values_of(model_type, **changes))


def assert_refused(values, *parts):
    with pytest.raises(InputError) as caught:
        read_config(values, "folder/config.json")
    message = str(caught.value)
    assert message.startswith("folder/config.json: ")
    assert [part for part in parts if part not in message] == [], message


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("vocab_size", "23", "whole number"),
        ("vocab_size", None, "whole number"),
        ("hidden_size", 16.0, "whole number"),
        ("hidden_size", True, "whole number"),
        ("hidden_size", 0, "whole number"),
        ("intermediate_size", -1, "whole number"),
        ("intermediate_size", 2**31, "whole number"),
        ("num_hidden_layers", 0, "whole number"),
        ("num_hidden_layers", 2**22, ""),
        ("num_attention_heads", [4], "whole number"),
        ("num_key_value_heads", 0, "whole number"),
        ("head_dim", "4", "whole number"),
        ("max_position_embeddings", 0.5, "whole number"),
        ("rms_norm_eps", 0, "finite number above 0"),
        ("rms_norm_eps", "1e-6", "finite number above 0"),
        ("rms_norm_eps", True, "finite number above 0"),
        pytest.param("rms_norm_eps", 10**400, "finite number above 0", id="beyond floats"),
        ("initializer_range", -0.1, "finite number above 0"),
        ("rope_theta", 0, "finite number above 0"),
        ("rope_theta", None, "finite number above 0"),
        ("tie_word_embeddings", 1, "true or false"),
        ("tie_word_embeddings", None, "true or false"),
        ("attention_bias", "no", "true or false"),
        ("mlp_bias", 0, "true or false"),
        ("bos_token_id", -1, "whole number"),
        ("eos_token_id", "2", ""),
        ("eos_token_id", [2, True], ""),
        ("hidden_act", "gelu", "silu"),
        ("hidden_act", None, "silu"),
        ("quantization_config", {"bits": 4}, "none"),
        ("partial_rotary_factor", 0.5, "1"),
        ("architectures", ["LlamaForSequenceClassification"], "LlamaForCausalLM"),
        ("architectures", ["MistralForCausalLM"], "LlamaForCausalLM"),
        ("architectures", [], "LlamaForCausalLM"),
        ("rope_scaling", [1], "object"),
        ("rope_parameters", "linear", "object"),
    ],
)
def test_a_value_of_the_wrong_kind_or_range_is_refused_by_name(field, value, expected):
    got = repr(value)
    got = got if len(got) <= 60 else got[:60]
    assert_refused(values_of(**{field: value}), field, got, "expected", expected)


@pytest.mark.parametrize("form", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(
    ("scaling", "field", "expected"),
    [
        ({"rope_type": "longrope"}, "'longrope'", "default, linear, dynamic, llama3, yarn"),
        ({"type": "mrope"}, "'mrope'", "default, linear, dynamic, llama3, yarn"),
        ({"rope_type": ["linear"]}, "['linear']", "default, linear, dynamic, llama3, yarn"),
        ({"rope_type": "linear"}, "factor is None", "finite number above 0"),
        ({"rope_type": "linear", "factor": 0.5}, "factor is 0.5", "at least 1"),
        ({"rope_type": "dynamic", "factor": "2"}, "factor is '2'", "finite number above 0"),
        ({"rope_type": "llama3", "factor": 2.0}, "low_freq_factor is None", "above 0"),
        (
            {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0},
            "low_freq_factor is 4.0",
            "less than high_freq_factor 4.0",
        ),
        (
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0},
            "original_max_position_embeddings is 0",
            "whole number",
        ),
        ({"rope_type": "yarn", "factor": 2.0, "truncate": 1}, "truncate is 1", "true or false"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor", "1"),
        ({"rope_theta": "1e4"}, "rope_theta is '1e4'", "finite number above 0"),
    ],
)
def test_a_rotary_embedding_that_is_not_read_is_refused_by_name(form, scaling, field, expected):
    assert_refused(values_of(**{form: scaling}), form, field, "expected", expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {FULL: {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}},
        {"head_dim": 2, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"rope_theta": 1.0, "rope_scaling": {"type": "yarn", "factor": 2.0}},
        {"rope_scaling": {"type": "dynamic", "factor": 1e300}},
    ],
    ids=["one for each kind of layer", "no second plane", "every plane alike", "no float"],
)
def test_a_rotary_embedding_that_cannot_be_computed_is_refused(changes):
    assert_refused(values_of(**changes), "rope")


@pytest.mark.parametrize(
    ("model_type", "changes", "parts"),
    [
        ("llama", {"num_key_value_heads": 3}, ("num_key_value_heads", "3", "4", "expected")),
        ("llama", {"head_dim": 5}, ("head_dim", "5", "expected", "even")),
        ("llama", {"head_dim": 2**31 - 2}, ("head_dim", "2147483646", "at most 65536")),
        (
            "llama",
            {"hidden_size": 18, "head_dim": None},
            ("hidden_size is 18", "expected a multiple of num_attention_heads 4"),
        ),
        ("llama", {"bos_token_id": 23}, ("bos_token_id", "23", "vocabulary of 23")),
        ("qwen3", {"eos_token_id": [2, 40]}, ("eos_token_id", "40", "vocabulary of 23")),
        ("qwen2", {"eos_token_id": list(range(65))}, ("eos_token_id", "at most 64")),
    ],
)
def test_values_that_do_not_fit_each_other_are_refused_by_name(model_type, changes, parts):
    assert_refused(values_of(model_type, **changes), *parts)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("qwen2", {"layer_types": [FULL, FULL]}),
        ("qwen2", {"layer_types": [FULL, FULL, "chunked_attention"]}),
        ("qwen2", {"layer_types": [FULL, FULL, SLIDING]}),
        ("qwen2", {"layer_types": [FULL, FULL, SLIDING], **WINDOW, "sliding_window": None}),
        ("qwen3", {"layer_types": [FULL, FULL, 1], **WINDOW}),
        ("qwen3", {"layer_types": [FULL, FULL, [FULL]], **WINDOW}),
        ("qwen3", {"layer_types": FULL}),
        ("llama", {"layer_types": [FULL, FULL, SLIDING]}),
        ("mistral", {"layer_types": [FULL, SLIDING, SLIDING]}),
        ("mistral", {"layer_types": [SLIDING] * 3, "sliding_window": None}),
    ],
)
def test_kinds_of_layers_that_do_not_fit_the_model_are_refused(model_type, changes):
    got = repr(changes["layer_types"])[:60]
    assert_refused(values_of(model_type, **changes), "layer_types", got, "expected", FULL)


@pytest.mark.parametrize("window", [0, -1, "5", 5.0])
@pytest.mark.parametrize("model_type", ["mistral", "qwen2"])
def test_a_window_that_is_no_number_of_tokens_is_refused(model_type, window):
    values = values_of(model_type, **{**WINDOW, "sliding_window": window})
    assert_refused(values, "sliding_window", repr(window), "expected a whole number")


@pytest.mark.parametrize("model_type", ["gemma2", "mixtral", "llava", None, ["llama"], {"a": 1}])
def test_another_model_type_is_refused_with_those_that_are_read(model_type):
    known = map(repr, ("opt", *MODEL_TYPES))
    assert_refused(
        {**values_of(), "model_type": model_type}, "model_type", repr(model_type), *known
    )


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_windows_are_those_of_the_layers_that_slide(model_type):
    slides = {**WINDOW, "max_window_layers": 1}
    config = read(model_type, **slides)
    first, rest = {"llama": (None, None), "mistral": (5, 5)}.get(model_type, (None, 5))
    assert attention_windows(config, 3) == (first, rest, rest)
    assert read(model_type, **{**slides, "sliding_window": None}).windows == (None,)
    if model_type.startswith("qwen"):
        kinds = [SLIDING, FULL, SLIDING]
        assert read(model_type, **slides, layer_types=kinds).windows == (5, None, 5)
        assert read(model_type, **{**slides, "use_sliding_window": False}).windows == (None,)
        assert read(model_type, **{**slides, "max_window_layers": 3}).windows == (None,)
        assert read(model_type, **{**slides, "max_window_layers": 0}).windows == (5,)


def test_biases_and_norms_are_those_of_the_family():
    asked = {"attention_bias": True, "mlp_bias": True}
    got = {
        model_type: (config.qkv_bias, config.attention_bias, config.mlp_bias, config.qk_norm)
        for model_type in MODEL_TYPES
        for config in [read(model_type, **asked)]
    }
    assert got == {
        "llama": (True, True, True, False),
        "mistral": (False, False, False, False),
        "qwen2": (True, False, False, False),
        "qwen3": (True, True, False, True),
    }
    assert [read(model_type).qkv_bias for model_type in MODEL_TYPES] == [False, False, True, False]


def test_end_tokens_are_none_one_or_several_each_once():
    assert read(eos_token_id=None).end_token_ids == ()
    assert read(eos_token_id=2).end_token_ids == (2,)
    assert read(eos_token_id=[5, 2, 5]).end_token_ids == (5, 2)
    assert read(eos_token_id=[]).end_token_ids == ()
    assert read(bos_token_id=None).bos_token_id is None


def hf_config(values):
    transformers = pytest.importorskip("transformers")
    return transformers.CONFIG_MAPPING[values["model_type"]].from_dict(dict(values))


def as_transformers_means(theirs):
    """The fields of a configuration of transformers under our names."""
    kinds = getattr(theirs, "layer_types", None)
    window = getattr(theirs, "sliding_window", None)
    layers, heads = theirs.num_hidden_layers, theirs.num_attention_heads
    if kinds is None:
        kinds = [FULL if window is None else SLIDING] * layers
    ends = theirs.eos_token_id
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps")
    names += ("num_attention_heads", "num_key_value_heads", "max_position_embeddings")
    names += ("tie_word_embeddings", "initializer_range", "bos_token_id")
    return {
        **{name: getattr(theirs, name) for name in names},
        "head_dim": getattr(theirs, "head_dim", None) or theirs.hidden_size // heads,
        "attention_bias": getattr(theirs, "attention_bias", False),
        "mlp_bias": getattr(theirs, "mlp_bias", False),
        "end_token_ids": () if ends is None else tuple(ends) if isinstance(ends, list) else (ends,),
        "windows": tuple(window if kind == SLIDING else None for kind in kinds),
        "rope_type": theirs.rope_parameters["rope_type"],
        "rope_theta": theirs.rope_parameters["rope_theta"],
    }


def as_we_read(config):
    windows = attention_windows(config, config.num_hidden_layers)
    rotary = config.rotary
    own = {**vars(config), "windows": windows}
    return {**own, "rope_type": rotary.rope_type, "rope_theta": rotary.rope_theta}


NULLS = dict.fromkeys(["bos_token_id", "eos_token_id", "rope_parameters", "rope_scaling"])
NULLS |= dict.fromkeys(["num_key_value_heads", "layer_types", "sliding_window", "head_dim"])


@pytest.mark.parametrize("case", ["nothing", "null", "some"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_what_a_file_lacks_or_leaves_null_means_what_transformers_means(model_type, case):
    values = {"model_type": model_type}
    if case == "null":
        values = values_of(model_type, **NULLS)
        # Where transformers takes no null.
        given = {"qwen3": "head_dim", "mistral": "num_key_value_heads"}.get(model_type)
        values |= {name: SIZES[name] for name in SIZES if name == given}
    elif case == "some":
        values |= {"use_sliding_window": True, "num_hidden_layers": 30, "hidden_size": 2048}
    expected = as_transformers_means(hf_config(values))
    got = as_we_read(read_config(values))
    assert {name: got[name] for name in expected} == expected


@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {}),
        ("mistral", {"sliding_window": 5}),
        ("qwen2", {"layer_types": [FULL] * 3}),
        ("qwen3", {**WINDOW, "layer_types": [SLIDING] * 3}),
        ("qwen3", {**WINDOW, "max_window_layers": 0}),
    ],
)
def test_a_model_of_another_depth_is_one_that_transformers_reads(model_type, changes, layers):
    config = dataclasses.replace(read(model_type, **changes), num_hidden_layers=layers)
    values = config.to_hf()
    assert values["num_hidden_layers"] == layers
    assert len(values.get("layer_types", range(layers))) == layers
    assert read_config(values) == config
    theirs = as_transformers_means(hf_config(values))
    assert theirs["windows"] == as_we_read(config)["windows"]
    assert len(theirs["windows"]) == layers


def test_layers_that_attend_unlike_fit_no_other_depth():
    config = read("qwen2", **WINDOW, max_window_layers=1)
    with pytest.raises(InputError, match=r"3 layers .* sliding window.* 2 layers"):
        dataclasses.replace(config, num_hidden_layers=2).to_hf()
    with pytest.raises(InputError, match=r"3 layers .* sliding window.* 2 layers"):
        attention_windows(config, 2)
    assert attention_windows(config, 3) == (None, 5, 5)


def test_what_is_replaced_is_written_and_the_rest_is_the_files():
    given = values_of(pretraining_tp=1, rope_scaling={"type": "linear", "factor": 2.0}, custom=[1])
    config = read_config(given)
    assert config.to_hf() == given
    smaller = dataclasses.replace(config, intermediate_size=7, tie_word_embeddings=True)
    assert smaller.to_hf() == {**given, "intermediate_size": 7, "tie_word_embeddings": True}
    assert read_config(smaller.to_hf()) == smaller != config


@pytest.mark.parametrize("kind", SCALINGS)
def test_both_forms_of_a_rotary_embedding_are_one_configuration(kind):
    scaling = SCALINGS[kind]
    new = read(rope_parameters={"rope_type": kind, "rope_theta": 500.0, **scaling})
    old = {"rope_theta": 500.0, "rope_scaling": {"type": kind, **scaling} if scaling else None}
    between = {"rope_theta": 500.0, "rope_parameters": {"rope_type": kind, **scaling}}
    for form in (old, between):
        assert read(**form) == new and hash(read(**form)) == hash(new)
    assert new.rotary.rope_type == kind and new.rotary.rope_theta == 500.0
    assert new != read(rope_parameters={"rope_type": kind, "rope_theta": 400.0, **scaling})


def test_a_dynamic_embedding_reaches_as_far_as_its_factor_says():
    dynamic = read(rope_scaling={"type": "dynamic", "factor": 2.0})
    linear = read(rope_scaling={"type": "linear", "factor": 2.0})
    assert (dynamic.max_position_embeddings, linear.max_position_embeddings) == (64, 32)
    assert dynamic.rotary.original_max_position_embeddings == 32


def test_yarn_without_a_factor_stretches_to_the_longest_sequence():
    scaling = {"rope_type": "yarn", "original_max_position_embeddings": 8}
    assert read(rope_parameters=scaling).rotary.factor == 4.0
    assert read(rope_parameters=scaling) == read(rope_parameters={**scaling, "factor": 4.0})


def test_channels_of_a_gated_mlp_are_counted_without_arrays():
    assert channel_count(read(hidden_size=4 * 2**26, intermediate_size=7)) == 7


def test_what_cannot_be_written_is_not_replaced():
    config = dataclasses.replace(read("llama"), rms_norm_eps=0.5)
    with pytest.raises(InputError, match="rms_norm_eps of a configuration cannot be replaced"):
        config.to_hf()
