"""GGUF files against the package's own writer, formulas written out, and damage."""

import builtins
import struct

import gguf
import numpy as np
import pytest

from gradot_jax.errors import InputError
from gradot_jax.files.gguf_file import open_gguf

KINDS = gguf.GGMLQuantizationType
WRITABLE = "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 TQ1_0 TQ2_0 MXFP4".split()
ONLY_READ = "Q2_K Q3_K Q4_K Q5_K Q6_K IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S".split()
ONLY_READ += "IQ4_NL IQ4_XS NVFP4".split()


@pytest.fixture
def write(tmp_path, gguf_bytes):
    def save(metadata, tensors=(), cut=None, **options):
        path = tmp_path / "model.gguf"
        path.write_bytes(gguf_bytes(metadata, tensors, **options)[:cut])
        return path

    return save


def single(write, kind, shape, data):
    path = write({}, [("w", shape, KINDS[kind].value, bytes(data))])
    return open_gguf(path).tensors["w"]


def test_what_the_package_writes_is_read(tmp_path):
    path, weights = tmp_path / "model.gguf", np.arange(96, dtype=np.float32).reshape(3, 32)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(3)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list(["a", "é", "\u2581c"])
    writer.add_token_types([1, 3, 1])
    writer.add_add_bos_token(True)
    writer.add_tensor("a", weights)
    quantised = gguf.quantize(weights, KINDS.Q8_0)
    writer.add_tensor("b", quantised, raw_dtype=KINDS.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(path)
    assert file.get("general.architecture", str) == "llama"
    assert file.get("llama.block_count", int) == 3
    assert file.get("llama.attention.layer_norm_rms_epsilon", float) == 1e-5
    assert file.get("tokenizer.ggml.tokens", list) == ["a", "é", "\u2581c"]
    assert file.get("tokenizer.ggml.token_type", np.ndarray).tolist() == [1, 3, 1]
    assert file.get("tokenizer.ggml.add_bos_token", bool) is True
    np.testing.assert_array_equal(file.tensors["a"].read("float32"), weights)
    expected = gguf.dequantize(quantised, KINDS.Q8_0)
    np.testing.assert_array_equal(file.tensors["b"].read("float32"), expected)
    assert file.tensors["b"].kind.name == "Q8_0"
    with pytest.raises(InputError, match=r"cannot carry: 'general.architecture'"):
        open_gguf(path).check_read("general.", "llamas.")
    file.check_read("general.", "llama.", "tokenizer.")


@pytest.mark.parametrize("kind", WRITABLE)
def test_a_quantisation_that_can_be_written_is_read_rows_at_a_time(kind, write, monkeypatch):
    monkeypatch.setattr("gradot_jax.files.gguf_file._DEQUANTISED", 1000)
    weights = np.random.default_rng(0).normal(size=(7, 256)).astype(np.float32)
    packed = gguf.quantize(weights, KINDS[kind])
    got = single(write, kind, (7, 256), packed.tobytes()).read("float32")
    np.testing.assert_array_equal(got, gguf.dequantize(packed, KINDS[kind]))
    assert np.abs(got - weights).max() < {"T": 4, "M": 1}.get(kind[0], 0.5)


@pytest.mark.parametrize("kind", ONLY_READ)
def test_a_quantisation_that_is_only_read_is_what_the_package_makes_of_it(kind, write):
    block, size = gguf.GGML_QUANT_SIZES[KINDS[kind]]
    # Bytes so small that no half float among them is infinite.
    data = np.random.default_rng(1).integers(0, 64, (2, 3 * size), np.uint8)
    got = single(write, kind, (2, 3 * block), data.tobytes()).read("float32")
    np.testing.assert_array_equal(got, gguf.dequantize(data, KINDS[kind]))
    assert len(np.unique(got)) > 3


def half(low, high):
    return np.frombuffer(bytes([low, high]), np.float16)[0].astype(np.float32)


def q8_0(block):
    return half(*block[:2]) * block[2:].view(np.int8).astype(np.float32)


def q4_1(block):
    scale, least = half(*block[:2]), half(*block[2:4])
    quants = [*(block[4:] & 15), *(block[4:] >> 4)]
    return [scale * np.float32(q) + least for q in quants]


def q4_k(block):
    scale, least, packed, values = half(*block[:2]), half(*block[2:4]), block[4:16], []
    for j in range(8):
        if j < 4:
            own, offset = packed[j] & 63, packed[j + 4] & 63
        else:
            own = (packed[j + 4] & 15) | (packed[j - 4] >> 6 << 4)
            offset = (packed[j + 4] >> 4) | (packed[j] >> 6 << 4)
        pairs = block[16 + 32 * (j // 2) :][:32]
        quants = pairs >> 4 if j % 2 else pairs & 15
        values += [scale * own * np.float32(q) - least * offset for q in quants]
    return values


def q6_k(block):
    low, high, scales = block[:128], block[128:192], block[192:208].view(np.int8)
    values = np.zeros(256, np.float32)
    for index in range(256):
        half_of, place = divmod(index, 128)
        quarter, column = divmod(place, 32)
        nibble = low[64 * half_of + 32 * (quarter % 2) + column] >> (4 * (quarter // 2)) & 15
        top = high[32 * half_of + column] >> (2 * quarter) & 3
        quant = np.float32(int(nibble) + 16 * int(top) - 32)
        values[index] = half(*block[208:]) * scales[index // 16] * quant
    return values


@pytest.mark.parametrize("formula", [q8_0, q4_1, q4_k, q6_k])
def test_values_are_those_of_the_formula_written_out(formula, write):
    kind = formula.__name__.upper()
    elements, size = gguf.GGML_QUANT_SIZES[KINDS[kind]]
    blocks = np.random.default_rng(2).integers(0, 256, (4, size), np.uint8)
    for low in (208,) if kind == "Q6_K" else (0,) if kind == "Q8_0" else (0, 2):
        blocks[:, low + 1] = 0x2E  # half floats of about a tenth
    got = single(write, kind, (2, 2 * elements), blocks.tobytes()).read("float32")
    expected = np.reshape([formula(block) for block in blocks], got.shape)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


def test_narrower_dtypes_round_and_do_not_overflow(write):
    weights = np.array([[1 + 2**-12, 1e5]], np.float32)
    tensor = single(write, "F32", (1, 2), weights.tobytes())
    assert tensor.read("bfloat16").astype(np.float32).tolist() == [[1.0, 99840.0]]
    with pytest.raises(InputError, match="tensor w holds numbers out of the range of float16"):
        tensor.read("float16")
    infinite = single(write, "F32", (2,), np.array([1, np.inf], np.float32).tobytes())
    with pytest.raises(InputError, match="tensor w holds NaN or Inf at 1 of 2"):
        infinite.read("float32")


WHOLE = ({"a": 1, "b": "text", "c": ["x", "y"]}, [("w", (2, 2), 0, bytes(16))])


def test_a_file_cut_anywhere_is_refused(write):
    length = len(write(*WHOLE).read_bytes())
    for cut in range(length - 16):
        with pytest.raises(InputError, match=r"model\.gguf"):
            open_gguf(write(*WHOLE, cut=cut))


def test_a_file_with_any_byte_changed_is_read_or_refused(write):
    path = write(*WHOLE)
    whole = bytearray(path.read_bytes())
    for place in range(len(whole) - 32):
        for byte in (0x00, 0x7F, 0xFF):
            path.write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
            try:
                open_gguf(path)
            except InputError as error:
                assert "model.gguf" in str(error)


FLOATS = ("w", (2, 2), 0, bytes(16))


@pytest.mark.parametrize(
    ("metadata", "tensors", "options", "message"),
    [
        ({}, [], {"version": 1}, "GGUF of version 1, expected 2 or 3"),
        ([("a", 1), ("a", 2)], [], {}, "key 'a' occurs twice"),
        ({"a": b"\xff"}, [], {}, "'a' is not UTF-8"),
        ({"a": ["x", b"\xff"]}, [], {}, "'a' is not UTF-8"),
        ([(b"\xff", 1)], [], {}, "a key is not UTF-8"),
        ({}, [(b"\xff", (2,), 0, bytes(8))], {}, "the name of a tensor is not UTF-8"),
        ({"general.alignment": 3}, [], {}, "general.alignment is 3, expected a power of two"),
        ({"general.alignment": "x"}, [], {}, "general.alignment is 'x', expected a whole"),
        ({"general.alignment": 0}, [], {}, "general.alignment is 0"),
        ({"split.count": 2}, [], {}, "split.count is 2, expected a model in one file"),
        ({}, [FLOATS, FLOATS], {}, "tensor 'w' occurs twice"),
        ({}, [("w", (2, 2), 99, bytes(16))], {}, "tensor 'w' is of an unknown type, 99"),
        ({}, [("w", (2, 2), 24, bytes(4))], {}, "type I8, which is not dequantised"),
        ({}, [("w", (2, 31), 8, bytes(68))], {}, "rows of 31, expected blocks of 32"),
        ({}, [("w", (2**40, 2**40), 0, bytes(16))], {}, "goes beyond the end of the file"),
        ({}, [("w", (2**63, 2**63), 0, b"")], {}, "goes beyond the end of the file"),
        ({}, [("w", (2, 0), 0, b"")], {}, r"has the shape \(2, 0\)"),
        ({}, [("w", (1,) * 5, 0, bytes(4))], {}, "has 5 dimensions"),
        ({}, [("w", (), 0, bytes(4))], {}, "has 0 dimensions"),
        ({}, [("v", (1,), 0, bytes(64)), FLOATS], {}, "begins at 64 of the data, expected 32"),
        ({}, [("w", (1,), 0, bytes(64))], {}, "bytes beyond its last tensor"),
    ],
)
def test_damage_is_refused_by_name(metadata, tensors, options, message, write):
    with pytest.raises(InputError, match=message):
        open_gguf(write(metadata, tensors, **options))


@pytest.mark.parametrize("inner", [0, 4, 8, 12])
def test_counts_beyond_the_file_take_no_memory(inner, tmp_path):
    path, huge = tmp_path / "model.gguf", 2**62
    start = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack("<Q", 1) + b"k"
    for damaged in (
        struct.pack("<4sIQQ", b"GGUF", 3, huge, huge),
        struct.pack("<4sIQQ", b"GGUF", 3, huge, 0),
        start + struct.pack("<IIQ", 9, inner, huge),
        start + struct.pack("<IQ", 8, huge),
    ):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="truncated in its header"):
            open_gguf(path)


def test_nested_lists_and_unknown_types_are_refused(tmp_path):
    start = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack("<Q", 1) + b"k"
    for end in (struct.pack("<IIQ", 9, 9, 1), struct.pack("<I", 77)):
        (tmp_path / "model.gguf").write_bytes(start + end)
        with pytest.raises(InputError, match="'k' is of type"):
            open_gguf(tmp_path / "model.gguf")


def test_values_of_another_kind_are_refused(write):
    file = open_gguf(write({"a": 1, "b": float("nan"), "c": "x" * 999, "d": 2**31, "e": -1}))
    for key, kind in (("a", float), ("a", bool), ("b", float), ("c", list), ("d", int), ("e", int)):
        with pytest.raises(InputError, match=f"{key} is .*, expected") as refused:
            file.get(key, kind)
        assert len(str(refused.value)) < 300
    with pytest.raises(InputError, match="f is absent, expected text"):
        file.get("f", str)
    assert file.get("f", str, "default") == "default"


def test_files_that_are_none_are_refused(tmp_path):
    (tmp_path / "empty.gguf").touch()
    (tmp_path / "other.gguf").write_bytes(b"PK\x03\x04" * 20)
    for name, message in (("empty", "not a GGUF"), ("other", "does not begin"), ("no", "cannot")):
        with pytest.raises(InputError, match=message):
            open_gguf(tmp_path / f"{name}.gguf")


def test_without_the_package_it_is_said_how_to_get_it(write, monkeypatch):
    actual = builtins.__import__

    def without(name, *rest):
        if name == "gguf":
            raise ImportError(name)
        return actual(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"pip install 'gradot_jax\[gguf\]'"):
        open_gguf(write({}))
