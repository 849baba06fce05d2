from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from sae.core.rows import on_disk
from sae.models import _activations
from sae.models._activations import activations

N_TOKENS = 7


class Block(nn.Module):
    """Returns a tuple, as the layers of transformers do, and changes with the mode that it is in."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.dropout = nn.Linear(4, 4), nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(torch.tanh(self.dense(x))), "attentions"


class Encoder(nn.Module):
    """Tokens × 4, and a last layer that works in place on what the one before returns."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 4)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm, self.relu, self.unused = nn.LayerNorm(4), nn.ReLU(inplace=True), nn.Linear(1, 1)

    def forward(self, input_ids, attention_mask=None, scale=1.0):
        x = self.embedding(input_ids) * scale
        for block in self.blocks:
            x = block(x)[0]
        return {"last_hidden_state": self.relu(self.norm(x)), "other": None}


@pytest.fixture
def encoder():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Encoder()


@pytest.fixture
def tokens():
    """Token ids of ten items (10, 7), and which are tokens: items have from 2 to 7, the third at the end (padded left)."""
    rng = np.random.default_rng(0)
    mask = np.arange(N_TOKENS) < rng.integers(2, N_TOKENS + 1, size=(10, 1))
    mask[2] = np.arange(N_TOKENS) >= 4
    return torch.from_numpy(rng.integers(20, size=(10, N_TOKENS))), torch.from_numpy(mask.astype(np.int64))


def batches(ids, mask, size=4):
    return [{"input_ids": a, "attention_mask": b} for a, b in zip(ids.split(size), mask.split(size), strict=True)]


@torch.no_grad()
def by_hand(encoder, ids, layer):
    """The hidden states (items, tokens, 4) step by step."""
    encoder.eval()
    x = encoder.embedding(ids)
    if layer == "embedding":
        return x.numpy()
    for i, block in enumerate(encoder.blocks):
        x = torch.tanh(x @ block.dense.weight.T + block.dense.bias)
        if layer == f"blocks.{i}":
            return x.numpy()
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    normed = (x - mean) / (variance + 1e-5).sqrt()
    return (normed if layer == "norm" else normed.clip(min=0)).numpy()


@pytest.mark.parametrize("layer", ["embedding", "blocks.0", "blocks.1", "norm", ""])
def test_hidden_states_of_every_token(encoder, tokens, layer):
    ids, mask = tokens
    hidden = by_hand(encoder, ids, layer)
    found = activations(encoder, layer, batches(ids, mask))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, hidden[mask.numpy() == 1], atol=1e-6)
    np.testing.assert_allclose(activations(encoder, layer, ids.split(3)), hidden.reshape(-1, 4), atol=1e-6)


@pytest.mark.parametrize("pool", ["mean", 0, 1, -1, -2])
def test_pooling(encoder, tokens, pool):
    ids, mask = tokens
    rows = [of_item[kept == 1] for of_item, kept in zip(by_hand(encoder, ids, "blocks.1"), mask.numpy(), strict=True)]
    expected = [row.mean(axis=0) if pool == "mean" else row[pool] for row in rows]
    found = activations(encoder, "blocks.1", batches(ids, mask), pool=pool)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    whole = by_hand(encoder, ids, "blocks.1")
    expected = whole.mean(axis=1) if pool == "mean" else whole[:, pool]
    np.testing.assert_allclose(activations(encoder, "blocks.1", [ids], pool=pool), expected, atol=1e-6)


def test_padding_that_is_nan_does_not_count(encoder, tokens):
    ids, mask = tokens
    expected = activations(encoder, "embedding", batches(ids, mask), pool="mean")
    with torch.no_grad():
        encoder.embedding.weight[0] = np.nan
    ids = torch.where(mask == 1, ids.clip(min=1), 0)
    found = activations(encoder, "embedding", batches(ids, mask), pool="mean")
    assert np.isfinite(found).all() and found.shape == expected.shape


def test_kinds_of_batches(encoder, tokens):
    ids, mask = tokens
    expected = activations(encoder, "blocks.0", batches(ids, mask, 10), pool="mean")
    for batch in ((ids, mask), [ids, mask], (ids.numpy(), mask.numpy()), (ids, mask, 1.0)):
        np.testing.assert_array_equal(activations(encoder, "blocks.0", [batch], pool="mean", mask=1), expected)
    named = {"input_ids": ids.numpy(), "scale": 1.0, "attention_mask": mask.numpy()}
    np.testing.assert_array_equal(activations(encoder, "blocks.0", [named], pool="mean"), expected)
    np.testing.assert_array_equal(
        activations(encoder, "blocks.0", iter([named]), pool="mean", mask="attention_mask"), expected
    )
    without = activations(encoder, "blocks.0", [ids], pool="mean")
    assert not np.allclose(without, expected)


def test_cells_by_genes():
    model = nn.Sequential(nn.Linear(5, 3), nn.ReLU(inplace=True), nn.Linear(3, 1)).to(torch.bfloat16)
    x = torch.randn(50, 5, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    found = activations(model, "0", x.split(16))
    assert found.dtype == np.float32 and (found < 0).any()
    np.testing.assert_array_equal(found, model[0](x).detach().float().numpy())


def test_a_model_of_transformers(tokens):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    ids, mask = tokens
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
        model = transformers.BertModel(transformers.BertConfig(vocab_size=20, **sizes))
    with torch.no_grad():
        expected = model.eval()(ids, mask, output_hidden_states=True).hidden_states[1][mask == 1]
    found = activations(model, "encoder.layer.0", batches(ids, mask))
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)


@pytest.mark.parametrize("n", [1, 10, 100_000])
def test_to_disk(tmp_path, n):
    model = nn.Sequential(nn.Linear(2, 3))
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(0))
    expected = activations(model, "0", [x])
    path = tmp_path / "hidden.npy"
    for out in (path, str(path)):
        found = activations(model, "0", x.split(4096), out=out)
        assert isinstance(found, np.memmap) and on_disk(found) and found.shape == (n, 3)
        np.testing.assert_array_equal(found, np.load(path))
        np.testing.assert_allclose(found, expected, atol=1e-6)
        del found
    assert list(tmp_path.iterdir()) == [path]


class Broken(nn.Module):
    """Fails at the third call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(2, 3), 0

    def forward(self, x):
        self.calls += 1
        if self.calls == 3:
            raise KeyboardInterrupt
        return self.layer(x)


@pytest.mark.parametrize("earlier", [True, False])
def test_nothing_is_left_of_a_failure(tmp_path, earlier):
    model = Broken()
    path = tmp_path / "hidden.npy"
    if earlier:
        path.write_bytes(b"an earlier result")
    with pytest.raises(KeyboardInterrupt):
        activations(model, "layer", [torch.ones(4, 2)] * 5, out=path)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"an earlier result"] * earlier
    assert not model.layer._forward_hooks and model.training and model.layer.training
    assert not torch.is_inference_mode_enabled()


def test_the_model_is_as_before(encoder, tokens):
    ids, mask = tokens
    encoder.train()
    encoder.blocks[0].eval()
    modes = [part.training for part in encoder.modules()]
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    found = activations(encoder, "blocks.1", batches(ids, mask))
    assert torch.rand(1) == expected
    assert [part.training for part in encoder.modules()] == modes
    np.testing.assert_array_equal(activations(encoder, "blocks.1", batches(ids, mask)), found)
    assert not any(part._forward_hooks for part in encoder.modules())
    assert all(tensor.grad is None and tensor.requires_grad for tensor in encoder.parameters())


# ---- Bad input


def test_a_layer_that_is_not_there(encoder, tokens):
    with pytest.raises(ValueError, match=r"The Encoder has no layer 'block.1'; the nearest names are 'blocks.1', "):
        activations(encoder, "block.1", [tokens[0]])


@pytest.mark.parametrize("out", [None, "hidden.npy"])
def test_no_batches(encoder, tmp_path, out):
    with pytest.raises(ValueError, match="There are no batches: `batches` is empty, or an iterator that was used up"):
        activations(encoder, "norm", iter([]), out=out and tmp_path / out)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("layer", "how", "error", "message"),
    [
        ("blocks.0", {"pool": 3}, ValueError, "pool=3 needs 4 tokens; 7 items of a batch have fewer"),
        ("blocks.0", {"pool": -4}, ValueError, "pool=-4 needs 4 tokens; 7 items"),
        ("blocks.0", {"mask": "padding"}, KeyError, "no entry 'padding' to use as mask=; it has 'input_ids', 'attention_mask'"),
        ("unused", {}, ValueError, "The layer 'unused' ran 0 times for one batch; it must run once"),
    ],
    ids=["short", "short from the end", "mask", "unused"],
)  # fmt: skip
def test_what_a_batch_lacks(encoder, tokens, layer, how, error, message):
    ids, mask = tokens
    with pytest.raises(error, match=message):
        activations(encoder, layer, batches(ids, mask, 10), **how)
    assert not any(part._forward_hooks for part in encoder.modules())


def test_a_mask_that_is_not_in_a_tuple(encoder, tokens):
    with pytest.raises(KeyError, match="no entry 2 to use as mask=; it has 2 arguments without names"):
        activations(encoder, "norm", [tokens], mask=2)
    with pytest.raises(ValueError, match=r"The mask has the shape \(10, 6\), and .* of \(10, 7, 4\)"):
        activations(encoder, "embedding", [(tokens[0], tokens[1][:, 1:])], mask=1)


class Odd(nn.Module):
    def __init__(self, output) -> None:
        super().__init__()
        self.output, self.same = output, nn.Identity()

    def forward(self, x):
        return self.same(self.output(x))


@pytest.mark.parametrize(
    ("output", "how", "error", "message"),
    [
        (
            lambda x: x[0, 0],
            {},
            ValueError,
            r"outputs an array of shape \(\); expected batch × d or batch × tokens × d\.",
        ),
        (lambda x: x[None, None], {}, ValueError, r"of shape \(1, 1, 3, 2\); expected batch × d or"),
        (lambda x: x, {"pool": "mean"}, ValueError, r"of shape \(3, 2\); expected batch × tokens × d for pool='mean'"),
        (lambda x: "text", {}, TypeError, "outputs a str; expected a tensor"),
        (lambda x: (), {}, TypeError, "outputs a tuple; expected a tensor"),
    ],
    ids=["scalar", "four dimensions", "nothing to pool", "text", "empty"],
)
def test_outputs_that_cannot_be_rows(output, how, error, message):
    with pytest.raises(error, match=message):
        activations(Odd(output), "same", [torch.ones(3, 2)], **how)


def test_widths_that_differ():
    with pytest.raises(ValueError, match="The layer has 3 dimensions in one batch and 2 in those before"):
        activations(Odd(lambda x: x), "same", [torch.ones(3, 2), torch.ones(3, 3)])


def test_a_layer_that_runs_twice():
    shared = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="The layer '0' ran 2 times for one batch"):
        activations(nn.Sequential(shared, shared), "0", [torch.ones(3, 2)])


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        activations(nn.Linear(2, 2), "", [torch.ones(3, 2)], out=tmp_path / "none" / "hidden.npy")


def test_a_progress_bar(capsys, monkeypatch):
    bars = []
    real = _activations.progress_bar
    monkeypatch.setattr(
        _activations, "progress_bar", lambda *args, **how: bars.append((args, how)) or real(*args, **how)
    )
    activations(nn.Linear(2, 2), "", [torch.ones(3, 2)] * 4)
    activations(nn.Linear(2, 2), "", iter([torch.ones(3, 2)] * 4), progress=False)
    assert [(args[0], how["shown"]) for args, how in bars] == [(4, True), (0, False)]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("batches", [torch.ones(4, 5), np.ones((4, 5)), {"input": torch.ones(4, 5)}])
def test_one_batch_is_not_several(batches):
    with pytest.raises(TypeError, match=f"batches= is a {type(batches).__name__}, which is one batch and not several"):
        activations(torch.nn.Sequential(torch.nn.Linear(5, 3)), "0", batches)


def test_settings_that_are_none():
    module = torch.nn.Sequential(torch.nn.Linear(5, 3))
    with pytest.raises(ValueError, match="pool='cls' is not None, 'mean' or the number of a token"):
        activations(module, "0", [torch.ones(4, 2, 5)], pool="cls")
    with pytest.raises(TypeError, match="module= is a dict; expected a torch.nn.Module"):
        activations({}, "0", [])
