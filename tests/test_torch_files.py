"""PyTorch files that hold other things than a model's tensors, or less than they claim."""

import importlib.util
import resource
import time

import numpy as np
import pytest
import tiny_models as tiny

from titok_jax.models import TiTokConfig
from titok_jax.weights import config_files, convert, pretrained, tensor_files

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="PyTorch is not installed: pip install torch"
)


def state_dict():
    import torch

    weights = convert.to_published(convert.table_for(tiny.TOKENIZER), tiny.params(tiny.TOKENIZER))
    return {name: torch.from_numpy(np.array(array)) for name, array in weights.items()}


@needs_torch
@pytest.mark.parametrize("archive", [True, False])
def test_tensors_that_claim_more_than_the_file_has(archive, tmp_path):
    """A stride of 0 shows one number a thousand million times; a file of a few KB was gigabytes in memory."""
    import torch

    path = tmp_path / "a.bin"
    numbers, nested = torch.zeros(1000), torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
    for content, message in (
        (
            {"a": numbers.as_strided((10**6, 1000), (0, 1))},
            "tensor a is of 4,000,000,000 bytes, but the file has only 4,000 ",
        ),
        ({"a": numbers.expand(2, 1000)}, "tensor a is of 8,000 bytes, but the file has only 4,000 for it"),
        ({str(n): numbers for n in range(1000)}, r"its tensors are of 4,000,000 bytes, but it has only 4,000$"),
        ({"a": torch.zeros(3, device="meta")}, "tensor a is torch.float32 and torch.strided on meta, which is not read"),
        ({"a": torch._neg_view(torch.ones(3))}, "tensor a is torch.float32 .*, which is not read"),
        ({"a": nested}, "tensor a is torch.float32 .*, which is not read|damaged, or holds more than tensors"),
        ({"a\x1b[2J\n" + "b" * 500: 1}, r"found int under 'a\\x1b\[2J\\nb{194}\.\.\.'"),
        ({"a\x1b[2J\n" + "b" * 500: numbers.to_sparse()}, r"tensor a\\x1b\[2J\\nb{194}\.\.\. is "),
    ):
        torch.save(content, path, _use_new_zipfile_serialization=archive)
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        with pytest.raises(convert.WeightsError, match=message), tensor_files.open_weights(path) as (_, tensors):
            [np.asarray(tensor) for tensor in tensors.values()]
        assert time.process_time() - start < 2
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB
    # Views of one memory, and one tensor under two names, are what trainers write.
    torch.save({"a": numbers[:500], "b": numbers[500:], "c": numbers.view(10, 100).T}, path)
    with tensor_files.open_weights(path) as (_, tensors):
        assert [tensor.shape for tensor in tensors.values()] == [(500,), (500,), (100, 10)]


@needs_torch
@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_weights_under_a_key_of_a_trainer(key, tmp_path, caplog):
    import torch

    path = tmp_path / "model" / "pytorch_model.bin"
    path.parent.mkdir()
    config_files.write_config(path.with_name("config.json"), tiny.TOKENIZER)
    torch.save({"epoch": 3, key: state_dict(), "optimizer": {"state": {}, "param_groups": []}}, path)
    for _ in range(2):
        params = convert.flatten(pretrained.load(path.parent, TiTokConfig)[1])
    wanted = convert.flatten(tiny.params(tiny.TOKENIZER))
    assert all(np.array_equal(params[name], wanted[name]) for name in wanted)
    assert [record.message for record in caplog.records] == [
        f"{path}: taking what it has under '{key}', not epoch, optimizer"
    ]


@needs_torch
def test_states_that_are_no_weights_are_named(tmp_path):
    import torch

    path = tmp_path / "a.bin"
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    for content, message in (
        (optimizer.state_dict(), "a.bin is an optimizer's state: expected a state dict"),
        (torch.optim.lr_scheduler.ConstantLR(optimizer).state_dict(), "a.bin is a learning rate schedule's state: expected"),
        ({"state_dict": {"a": 1}}, "found dict under 'state_dict'; save only the state dict of the model"),
        ([torch.zeros(2)], "expected a state dict .*, found list"),
        ({0: torch.zeros(2)}, "found Tensor under '0'"),
    ):
        torch.save(content, path)
        with pytest.raises(convert.WeightsError, match=message):
            pretrained.load(path, TiTokConfig)


@needs_torch
def test_a_refused_pickle_is_not_told_how_to_run(tmp_path):
    import torch

    torch.save(torch.nn.Linear(2, 2), tmp_path / "a.bin")
    with pytest.raises(convert.WeightsError) as error:
        pretrained.load(tmp_path / "a.bin", TiTokConfig)
    assert "Unsupported global: GLOBAL torch.nn.modules.linear.Linear" in str(error.value)
    assert "add_safe_globals" not in str(error.value)
