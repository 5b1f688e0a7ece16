"""Weights files made to do harm: each is refused in one sentence, at once, in little memory, without control characters."""

import json
import struct
import time

import ml_dtypes
import numpy as np
import pytest
import tiny_models as tiny
from flax import serialization

from titok_jax.models import GeneratorConfig, MaskgitVQGANConfig, TiTokConfig
from titok_jax.weights import config_files, convert, pretrained, safetensors_file

NASTY = "a\x1b[31m\n" + "b" * 1000


def safetensors_file_of(path, header: str, data: bytes = b""):
    text = header.encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def refused(path, kind=TiTokConfig) -> str:
    """The message of the refusal, which took less than two seconds of this process."""
    start = time.process_time()
    with pytest.raises(convert.WeightsError) as error:
        pretrained.load(path, kind)
    assert time.process_time() - start < 2
    message = str(error.value)
    assert str(path) in message
    assert all(char.isprintable() or char == "\n" for char in message), message
    assert len(message) < 2000 + 2 * len(str(path))
    return message


def entry(shape="[1]", dtype="F32"):
    return f'{{"dtype": {json.dumps(dtype)}, "shape": {shape}, "data_offsets": [0, 4]}}'


def test_dimensions_are_bounded_before_they_are_multiplied(tmp_path):
    path = tmp_path / "a.safetensors"
    for shape in (
        "[" + ",".join(["9" * 4000] * 1000) + "]",  # 47 s without a bound
        "[" + ",".join(["1"] * 33) + "]",
        f"[{2**63}]",
    ):
        safetensors_file_of(path, f'{{"a": {entry(shape)}}}', b"\0" * 4)
        assert "its header has a bad entry for a;" in refused(path)
    safetensors_file_of(path, '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, %s]}}' % ("9" * 4299), b"\0" * 4)
    assert "its header has a bad entry for a;" in refused(path)


def test_dimensions_of_flax_arrays_are_bounded(tmp_path):
    path = tmp_path / "a.msgpack"
    large = b"\xcf" + b"\xff" * 8

    def array(axes: bytes, count: int) -> bytes:
        head = b"\x93\xdd" + struct.pack(">I", count) + axes
        content = head + b"\xa7float32" + b"\xc4\x04" + b"\0" * 4
        return b"\x81\xa1a\xc9" + struct.pack(">I", len(content)) + b"\x01" + content

    path.write_bytes(array(large * 400_000, 400_000))
    assert "a has 400000 axes, expected at most 32" in refused(path, MaskgitVQGANConfig)
    path.write_bytes(array(large * 32, 32))
    assert "the bytes of a do not make float32 [18446744073709551615" in refused(path, MaskgitVQGANConfig)
    path.write_bytes(b"\x81\xdb" + struct.pack(">I", 5000) + b"a" * 5000)
    assert "a name of 5000 bytes" in refused(path, MaskgitVQGANConfig)
    path.write_bytes(b"\xdf" + struct.pack(">I", 200_000) + b"".join(b"\xa6%06d\x80" % n for n in range(200_000)))
    assert "more than 100000 entries" in refused(path, MaskgitVQGANConfig)


def test_a_header_of_many_tensors(tmp_path):
    path = tmp_path / "a.safetensors"
    empty = '{"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}'
    safetensors_file_of(path, "{" + ",".join(f'"{number:06d}": {empty}' for number in range(100_001)) + "}")
    assert "its header has 100001 tensors, expected at most 100000" in refused(path)
    path.write_bytes(struct.pack("<Q", 20_000_001) + b"{}" + b" " * 20_000_000)
    assert "its header should have 20000001 bytes" in refused(path)


def test_names_from_files_are_short_and_escaped(tmp_path):
    """In every message that has one."""
    path, name = tmp_path / "a.safetensors", json.dumps(NASTY)
    shown = r"a\x1b[31m\n" + "b" * 190
    for header in (
        f"{{{name}: {{}}}}",
        f"{{{name}: {entry('2')}}}",
        f"{{{name}: {entry('[2]')}}}",
        f"{{{name}: {entry(dtype='F4')}}}",
    ):
        safetensors_file_of(path, header, b"\0" * 4)
        assert shown[:190] in refused(path)
    safetensors_file_of(path, f'{{"a": {entry(dtype=NASTY)}}}', b"\0" * 4)
    assert shown[:190] in refused(path)

    folder = tiny.save(tmp_path / "model", tiny.TOKENIZER)
    weights = convert.to_published(convert.table_for(tiny.TOKENIZER), tiny.params(tiny.TOKENIZER))
    safetensors_file.write_safetensors(folder / "model.safetensors", weights | {NASTY: np.zeros(2, np.float32)})
    assert f"1 tensors do not fit the model:\n  surplus: {shown[:190]}" in refused(folder)
    config = json.loads((folder / "config.json").read_text())
    config["model"]["vq_model"][NASTY] = 1
    (folder / "config.json").write_text(json.dumps(config))
    assert f"unknown keys in model.vq_model: {shown[:190]}" in refused(folder)
    (folder / "config.json").write_text(json.dumps({"family": NASTY}))
    assert f"unknown family of models '{shown[:190]}" in refused(folder)

    path = tmp_path / "a.msgpack"
    for value in (b"\xc7\x04\x02abcd", b"\xc7\x04\x01\x90abc"):
        text = NASTY[:400].encode()
        path.write_bytes(b"\x81\xda" + struct.pack(">H", len(text)) + text + value)
        assert shown[:190] in refused(path, MaskgitVQGANConfig)
    path.write_bytes(serialization.to_bytes({"params": {NASTY[:400]: np.zeros(2, ml_dtypes.bfloat16)}}))
    assert f"surplus: {shown[:190]}" in refused(path, MaskgitVQGANConfig)


def test_a_list_of_tensors_stops_at_five(tmp_path):
    folder = tiny.save(tmp_path / "model", tiny.TOKENIZER)
    weights = convert.to_published(convert.table_for(tiny.TOKENIZER), tiny.params(tiny.TOKENIZER))
    renamed = {f"net.{name}": array for name, array in weights.items()}
    safetensors_file.write_safetensors(folder / "model.safetensors", renamed)
    message = refused(folder)
    assert len(message.splitlines()) == 1 + 6 + 6
    assert f"{2 * len(weights)} tensors do not fit the model" in message
    for what in ("missing", "surplus"):
        assert f"\n  ... and {len(weights) - 5} more {what}" in message


def test_a_configuration_that_names_a_part_again_and_again(tmp_path):
    """YAML lets 600 bytes stand for a thousand million values."""
    folder = tiny.save(tmp_path / "model", tiny.TOKENIZER)
    lines = ["a0: &a0 [1, 1]"] + [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}]" for n in range(1, 20)]
    path = folder / "config.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(convert.WeightsError, match=r"config\.yaml is not a configuration: it has more than 100000 values"):
        config_files.read_config(path)
    path.write_text("a: &a\n  b: *a\n")
    with pytest.raises(convert.WeightsError, match=r"config\.yaml is not valid YAML"):
        config_files.read_config(path)
    path.write_text("a: 0x" + "f" * 10_000)
    with pytest.raises(convert.WeightsError, match=r"not a generator configuration"):
        config_files.read_config_as(path, GeneratorConfig)
