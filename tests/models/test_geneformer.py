"""Geneformer: a small real checkpoint, loaded the real way, against transformers called directly and layers run by hand."""

from __future__ import annotations

import math
import shutil

import anndata as ad
import dask.array
import mudata
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import sparse
from transformers import BertConfig, BertForMaskedLM
from transformers.utils import logging as transformers_logging

import sae
from sae.models._geneformer import Geneformer

N_GENES, N_CELLS, CONTEXT, LAYERS, HEADS, D = 56, 24, 32, 3, 4, 32
IDS = [f"ENSG{i:011}" for i in range(N_GENES)]
SPECIAL = {"v1": ["<pad>", "<mask>"], "v2": ["<pad>", "<mask>", "<cls>", "<eos>"]}
TOKENS = {version: {name: i for i, name in enumerate([*names, *IDS])} for version, names in SPECIAL.items()}
MEDIANS = dict(zip(IDS, np.random.default_rng(1).uniform(0.5, 3, N_GENES), strict=True))
VERSIONS = pytest.mark.parametrize("version", ["v1", "v2"])
STATES = range(LAYERS + 1)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("geneformer")
    for version, tokens in TOKENS.items():
        config = BertConfig(
            vocab_size=len(tokens),
            hidden_size=D,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=48,
            max_position_embeddings=CONTEXT,
            initializer_range=0.3,
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            BertForMaskedLM(config).save_pretrained(folder / version)
    return folder


@pytest.fixture
def make(checkpoints):
    """Load a model, with as little said as possible."""

    def load(version="v2", **settings):
        arguments = {"hidden_state": 2, "device": "cpu", "progress": False} | settings
        return Geneformer(checkpoints / version, TOKENS[version], MEDIANS, **arguments)

    return load


@pytest.fixture
def cells():
    """Counts of few to all genes, so that cells differ in length and some exceed the context."""
    rng = np.random.default_rng(0)
    share = rng.uniform(0.05, 1, (N_CELLS, 1))
    counts = rng.poisson(rng.gamma(2, 2, (N_CELLS, N_GENES))) * (rng.random((N_CELLS, N_GENES)) < share)
    counts[:, 0] += 1
    adata = ad.AnnData(sparse.csr_matrix(counts.astype(np.float32)), var=pd.DataFrame(index=IDS))
    lengths = (counts > 0).sum(1)
    assert lengths.min() < 10 and lengths.max() > CONTEXT
    return adata


# ---- Oracles


def genes_by_hand(adata, version):
    """The published rule as a plain loop: the tokens of each cell's genes, as many as there is room for."""
    tokens = TOKENS[version]
    room = CONTEXT - len(SPECIAL[version]) + 2
    found = []
    for counts in adata.X.toarray().astype(float):
        value = {
            tokens[gene]: count / counts.sum() * 10_000 / MEDIANS[gene]
            for gene, count in zip(adata.var_names, counts, strict=True)
            if count > 0
        }
        found.append(sorted(value, key=lambda token, value=value: (-value[token], token))[:room])
    return found


def framed(genes, version):
    return genes if version == "v1" else [2, *genes, 3]


def only_genes(version):
    return slice(None) if version == "v1" else slice(1, -1)


def states_by_transformers(folder, ids):
    """Each hidden state (positions, d) of one cell, from transformers itself."""
    with torch.no_grad():
        return [
            state[0].numpy()
            for state in BertForMaskedLM.from_pretrained(folder)
            .eval()(torch.tensor([ids]), output_hidden_states=True)
            .hidden_states
        ]


def bert_by_hand(folder, ids, change=None):
    """Log-probabilities (positions, tokens): the published equations of BERT on the stored weights, cell by cell.

    `change` maps a hidden state's number and values to other values.
    """
    w = {name: value.double() for name, value in load_file(folder / "model.safetensors").items()}
    change = change or (lambda number, x: x)

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        centred = x - x.mean(1, keepdim=True)
        scaled = centred / torch.sqrt((centred**2).mean(1, keepdim=True) + 1e-12)
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def gelu(x):
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2

    def heads(x):
        return x.reshape(len(ids), HEADS, D // HEADS).transpose(0, 1)

    table = "bert.embeddings."
    x = w[f"{table}word_embeddings.weight"][ids] + w[f"{table}position_embeddings.weight"][: len(ids)]
    x = change(0, norm(x + w[f"{table}token_type_embeddings.weight"][0], f"{table}LayerNorm"))
    for layer in range(LAYERS):
        name = f"bert.encoder.layer.{layer}."
        q, k, v = (heads(linear(x, f"{name}attention.self.{part}")) for part in ("query", "key", "value"))
        read = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(D // HEADS), dim=2) @ v
        read = linear(read.transpose(0, 1).reshape(len(ids), D), f"{name}attention.output.dense")
        x = norm(read + x, f"{name}attention.output.LayerNorm")
        wide = gelu(linear(x, f"{name}intermediate.dense"))
        x = change(layer + 1, norm(linear(wide, f"{name}output.dense") + x, f"{name}output.LayerNorm"))
    head = "cls.predictions."
    x = norm(gelu(linear(x, f"{head}transform.dense")), f"{head}transform.LayerNorm")
    logits = x @ w[f"{table}word_embeddings.weight"].T + w[f"{head}bias"]
    return torch.log_softmax(logits, dim=1)


def read_ids(model):
    """Keep what a model reads from now on: the tokens of each cell in a batch, without padding."""
    seen = []

    def hook(module, args, kwargs):
        for ids, filled in zip(kwargs["input_ids"], kwargs["attention_mask"], strict=True):
            seen.append(ids[filled.bool()].tolist())

    model._bert.bert.register_forward_pre_hook(hook, with_kwargs=True)
    return seen


# ---- Tokens


@VERSIONS
def test_tokens(make, cells, version):
    model = make(version)
    found = [list(cell) for cell in model.tokenize(cells)]
    assert found == [framed(genes, version) for genes in genes_by_hand(cells, version)]
    assert max(map(len, found)) == CONTEXT
    assert model.vocabulary[found[0][3]] == IDS[found[0][3] - len(SPECIAL[version])]


@pytest.mark.parametrize(
    ("column", "settings"),
    [
        ("ensembl_id", {}),
        ("gene_ids", {"gene_ids": "gene_ids"}),
        (None, {"gene_names": {f"S{i}": gene for i, gene in enumerate(IDS)}}),
    ],
    ids=["ensembl_id", "gene_ids", "gene_names"],
)
def test_where_ids_are(make, cells, column, settings):
    expected = make().embed(cells)
    if column is not None:
        cells.var[column] = pd.Categorical([f"{name}.7" for name in IDS])
    cells.var_names = [f"S{i}" for i in range(N_GENES)]
    np.testing.assert_array_equal(make(**settings).embed(cells), expected)


# ---- The latent


@VERSIONS
@pytest.mark.parametrize("state", [*STATES, -1, -2, -4])
def test_hidden_states_are_those_of_transformers(make, checkpoints, cells, version, state):
    model = make(version, hidden_state=state, batch_size=5)
    found, genes = model.embed(cells, embed_genes=True)
    assert found.dtype == np.float32 and found.shape == (N_CELLS, D) == (cells.n_obs, model.n_latent)
    expected = [
        states_by_transformers(checkpoints / version, framed(ids, version))[state][only_genes(version)]
        for ids in genes_by_hand(cells, version)
    ]
    np.testing.assert_allclose(genes.X, np.concatenate(expected), atol=1e-5)
    np.testing.assert_allclose(found, [values.mean(0) for values in expected], atol=1e-5)
    assert model.hidden_state == state % (LAYERS + 1)


@pytest.mark.parametrize("state", [1, 3])
def test_cls(make, checkpoints, cells, state):
    found = make(hidden_state=state, pool="cls").embed(cells)
    expected = [
        states_by_transformers(checkpoints / "v2", framed(ids, "v2"))[state][0] for ids in genes_by_hand(cells, "v2")
    ]
    np.testing.assert_allclose(found, expected, atol=1e-5)


@VERSIONS
def test_cells_keep_their_order(make, cells, version):
    model = make(version, batch_size=4)
    order = np.random.default_rng(3).permutation(N_CELLS)
    latent = model.embed(cells)
    np.testing.assert_allclose(model.embed(cells[order]), latent[order], atol=1e-5)
    np.testing.assert_allclose(make(version, batch_size=1).embed(cells), latent, atol=1e-5)
    assert np.abs(latent[order] - latent).max() > 0.1


def test_states_of_genes(make, cells, tmp_path):
    cells.var["ensembl_id"] = IDS
    cells.var_names = [f"S{i}" for i in range(N_GENES)]
    cells = cells[:, np.random.default_rng(2).permutation(N_GENES)].copy()
    model = make()
    latent, genes = model.embed(cells, embed_genes=True)
    np.testing.assert_array_equal(latent, model.embed(cells))
    expected = [
        (cell, f"S{token - 4}", rank)
        for cell, tokens in zip(cells.obs_names, genes_by_hand(cells_named(cells), "v2"), strict=True)
        for rank, token in enumerate(tokens)
    ]
    assert list(genes.obs.itertuples(index=False, name=None)) == expected
    pd.testing.assert_frame_equal(
        genes.to_df().groupby(genes.obs["cell"].to_numpy()).mean().loc[cells.obs_names],
        pd.DataFrame(latent, cells.obs_names, genes.var_names),
        check_names=False,
        atol=1e-5,
    )

    on_disk = model.embed(cells, embed_genes=True, out=tmp_path / "genes.npy")[1]
    np.testing.assert_array_equal(np.load(tmp_path / "genes.npy"), genes.X)
    assert isinstance(on_disk.X, np.memmap)
    genes.write_h5ad(tmp_path / "genes.h5ad")
    pd.testing.assert_frame_equal(ad.read_h5ad(tmp_path / "genes.h5ad").obs, genes.obs)


def cells_named(cells):
    named = cells.copy()
    named.var_names = named.var["ensembl_id"]
    return named


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_an_sae_on_genes(make, cells, tmp_path, where):
    genes = make().embed(cells, embed_genes=True, out=tmp_path / "genes.npy" if where == "disk" else None)[1]
    sae.tl.fit(genes, use_rep="X", n_features=32, steps=50, progress=False)
    sae.tl.encode(genes)
    assert genes.obsm["sae"].shape == (genes.n_obs, 32)
    assert genes.uns["sae"]["params"]["val_fvu"] < 0.9


@pytest.mark.parametrize("form", ["dense", "csc", "int", "bool", "dask", "backed", "backed dense", "layer", "view"])
def test_forms_of_counts(make, cells, compare, tmp_path, form):
    model = make(layer="counts" if form == "layer" else None)
    if form == "bool":
        cells.X.data[:] = 1
    expected = make().embed(cells)
    adata = cells.copy()
    match form:
        case "dense" | "backed dense":
            adata.X = adata.X.toarray()
        case "csc":
            adata.X = adata.X.tocsc()
        case "int" | "bool":
            adata.X = adata.X.astype(form)
        case "dask":
            adata.X = dask.array.from_array(adata.X.toarray(), chunks=(7, N_GENES))
        case "layer":
            adata.layers["counts"], adata.X = adata.X, adata.X.log1p()
        case "view":
            adata = ad.concat([adata, adata], index_unique="-")[:N_CELLS]
    if form.startswith("backed"):
        adata.write_h5ad(tmp_path / "cells.h5ad")
        adata = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    before = None if form.startswith(("backed", "dask")) else compare.state(adata)
    np.testing.assert_array_equal(model.embed(adata), expected)
    assert model.intervene(np.zeros((N_CELLS, D)), adata).shape == (N_CELLS, N_GENES)
    if before is not None:
        compare.assert_same(before, compare.state(adata))


def test_no_cells(make, cells):
    latent, genes = make().embed(cells[:0], embed_genes=True)
    assert latent.shape == (0, D) and genes.shape == (0, D)
    assert make().intervene(latent, cells[:0]).shape == (0, N_GENES)


# ---- Interventions


def log_mean_by_hand(log_p, positions):
    return np.log(np.exp(log_p[positions].numpy()).mean(0))


@VERSIONS
@pytest.mark.parametrize("mask_share", [0.15, 1.0])
def test_a_step_of_zero_is_the_model_itself(make, checkpoints, cells, version, mask_share):
    model = make(version, mask_share=mask_share, batch_size=1)
    seen = read_ids(model)
    found = model.intervene(np.zeros((N_CELLS, D)), cells)
    assert found.uns["scale"] == "log" and found.X.dtype == np.float32
    assert list(found.obs_names) == list(cells.obs_names) and list(found.var_names) == IDS
    expected = np.full(found.shape, np.nan)
    order = sorted(range(N_CELLS), key=lambda i: -len(genes_by_hand(cells, version)[i]))
    bert = BertForMaskedLM.from_pretrained(checkpoints / version).eval()
    for cell, ids in zip(order, seen, strict=True):
        with torch.no_grad():
            log_p = bert(torch.tensor([ids])).logits[0].log_softmax(1)
        expected[cell] = log_mean_by_hand(log_p, np.array(ids) == 1)[len(SPECIAL[version]) :]
    np.testing.assert_allclose(found.X, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("version", "pool", "state"),
    [("v1", "mean", state) for state in STATES]
    + [("v2", "mean", state) for state in STATES]
    + [("v2", "cls", state) for state in STATES[:-1]],
)
def test_a_step_against_layers_by_hand(make, checkpoints, cells, version, pool, state):
    """With every gene masked, so that it is known which are."""
    model = make(version, pool=pool, hidden_state=state, mask_share=1, batch_size=7)
    step = np.random.default_rng(5).normal(size=(N_CELLS, D))
    found = model.intervene(step, cells)
    moved = np.abs(found.X - model.intervene(step * 0, cells).X)
    assert moved.max(1).min() > 0.01
    for cell, genes in enumerate(genes_by_hand(cells, version)):
        ids = framed([1] * len(genes), version)
        places = np.zeros((len(ids), 1))
        places[only_genes(version) if pool == "mean" else 0] = 1
        added = torch.tensor(places * step[cell])
        log_p = bert_by_hand(
            checkpoints / version, ids, lambda number, x, added=added: x + added if number == state else x
        )
        expected = log_mean_by_hand(log_p[only_genes(version)], slice(None))[len(SPECIAL[version]) :]
        np.testing.assert_allclose(found.X[cell], expected, atol=1e-4)


def test_the_layers_by_hand_are_bert(checkpoints, cells):
    """The oracle above is right where nothing is changed."""
    ids = framed(genes_by_hand(cells, "v2")[0], "v2")
    with torch.no_grad():
        logits = BertForMaskedLM.from_pretrained(checkpoints / "v2").eval()(torch.tensor([ids])).logits[0]
    np.testing.assert_allclose(bert_by_hand(checkpoints / "v2", ids), logits.log_softmax(1), atol=1e-4)


@VERSIONS
def test_masks(make, cells, version):
    """15 % of a cell's genes, one at least, the same whatever the step, the neighbours and the order of the genes."""
    model = make(version, batch_size=1)
    seen = read_ids(model)
    model.intervene(np.zeros((N_CELLS, D)), cells)
    model.intervene(np.ones((N_CELLS, D)), cells)
    model.intervene(np.zeros((N_CELLS, D)), cells[:, ::-1].copy())
    assert seen[:N_CELLS] == seen[N_CELLS : 2 * N_CELLS] == seen[2 * N_CELLS :]
    alone = [ids for cell in range(N_CELLS) for ids in masked_alone(make(version), cells[cell])]
    assert sorted(alone) == sorted(seen[:N_CELLS])
    whole = [framed(genes, version) for genes in genes_by_hand(cells, version)]
    for ids, tokens in zip(alone, whole, strict=True):
        n_genes = len(tokens[only_genes(version)])
        assert sum(token == 1 for token in ids) == max(1, round(0.15 * n_genes))
        assert all(a in (1, b) for a, b in zip(ids, tokens, strict=True))
        assert version == "v1" or (ids[0], ids[-1]) == (2, 3)
    assert [ids for cell in range(N_CELLS) for ids in masked_alone(make(version, rng=1), cells[cell])] != alone
    generators = [make(version, rng=np.random.default_rng(8)) for _ in range(2)]
    a, b = (model.intervene(np.zeros((N_CELLS, D)), cells).X for model in generators)
    np.testing.assert_array_equal(a, b)


def masked_alone(model, cell):
    seen = read_ids(model)
    model.intervene(np.zeros((1, D)), cell)
    return seen


def test_a_step_does_not_reach_other_cells(make, cells):
    model = make(batch_size=8)
    step = np.zeros((N_CELLS, D))
    before = model.intervene(step, cells).X
    step[3] = 5
    changed = np.abs(model.intervene(step, cells).X - before).max(1) > 1e-6
    assert np.flatnonzero(changed).tolist() == [3]
    np.testing.assert_allclose(make().intervene(step[[9, 3]], cells[[9, 3]]).X[0], before[9], atol=1e-5)
    assert not model._bert.bert.encoder.layer[1]._forward_hooks


def test_genes_without_a_token_have_no_prediction(make, cells):
    cells.var_names = [f"{IDS[0]}.2", "ENSG09999999999", *IDS[2:]]
    found = make().intervene(np.zeros((N_CELLS, D)), cells)
    assert np.flatnonzero(np.isnan(found.X).any(0)).tolist() == [1]
    assert np.isnan(found.X[:, 1]).all()
    assert list(found.var_names) == list(cells.var_names)


def test_two_columns_of_one_gene(make, cells):
    twice = ad.concat({"": cells, ".1": cells[:, :3]}, axis=1, index_unique="").copy()
    summed = cells.copy()
    summed.X = sparse.csr_matrix(cells.X.toarray() * np.where(np.arange(N_GENES) < 3, 2, 1))
    model = make()
    latent, genes = model.embed(twice, embed_genes=True)
    np.testing.assert_array_equal(latent, model.embed(summed))
    assert set(genes.obs["gene"]) <= set(IDS)
    assert set(model.embed(twice[:, ::-1].copy(), embed_genes=True)[1].obs["gene"]) >= {f"{IDS[0]}.1", IDS[3]}
    found = model.intervene(np.zeros((N_CELLS, D)), twice).X
    np.testing.assert_array_equal(found[:, N_GENES:], found[:, :3])


# ---- Bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_state": 4}, r"hidden_state=4, but the model has 4: 0 \(the embeddings\) to 3 .* or −1 to -4"),
        ({"hidden_state": -5}, "hidden_state=-5, but the model has 4"),
        ({"pool": "max"}, "pool='max' is neither 'mean' nor 'cls'"),
        ({"version": "v1", "pool": "cls"}, "pool='cls', but tokens has no '<cls>': this is a V1 model"),
        ({"min_share": 1.5}, "min_share=1.5 is not a share"),
        ({"mask_share": 0.0}, "mask_share=0.0 is not a share"),
        ({"batch_size": 0}, "batch_size=0 is below 1"),
        ({"gene_names": "names.pkl"}, "gene_names='names.pkl' is a pickle"),
    ],
    ids=["high", "low", "pool", "cls", "share", "mask", "batch", "pickle"],
)
def test_settings_that_cannot_be(make, settings, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "names.pkl").write_bytes(b"\x80\x04}.")
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_dictionary_of_another_version(checkpoints):
    with pytest.raises(
        ValueError, match="has 60 tokens, and the dictionary 58. Pass as tokens= the dictionary of the same"
    ):
        Geneformer(checkpoints / "v2", TOKENS["v1"], MEDIANS, hidden_state=0)


def test_a_checkpoint_in_a_pickle(checkpoints, tmp_path):
    shutil.copy(checkpoints / "v2" / "config.json", tmp_path)
    torch.save(load_file(checkpoints / "v2" / "model.safetensors"), tmp_path / "pytorch_model.bin")
    message = "has no model.safetensors; it has 'config.json', 'pytorch_model.bin'.*not opened. Convert them once"
    with pytest.raises(ValueError, match=message):
        Geneformer(tmp_path, TOKENS["v2"], MEDIANS, hidden_state=0)


def test_a_checkpoint_that_lacks_weights(checkpoints, tmp_path):
    """They would be random."""
    weights = load_file(checkpoints / "v2" / "model.safetensors")
    lost = "bert.encoder.layer.1.output.dense.weight"
    shutil.copytree(checkpoints / "v2", tmp_path / "v2")
    save_file({k: v for k, v in weights.items() if k != lost}, tmp_path / "v2" / "model.safetensors", {"format": "pt"})
    before = torch.random.get_rng_state()
    with pytest.raises(ValueError, match=f"lacks 1 weights of a Geneformer: '{lost}'"):
        Geneformer(tmp_path / "v2", TOKENS["v2"], MEDIANS, hidden_state=0)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("path", ["nobody/nothing", "no_such_folder"])
def test_no_such_model(path):
    with pytest.raises(OSError) as error:
        Geneformer(path, TOKENS["v2"], MEDIANS, hidden_state=0)
    assert f"There is no folder '{path}'. Pass local_files_only=False" in error.value.__notes__[0]


def test_subfolder(checkpoints, cells, make):
    model = Geneformer(checkpoints, TOKENS["v2"], MEDIANS, hidden_state=2, subfolder="v2", device="cpu", progress=False)
    np.testing.assert_array_equal(model.embed(cells), make().embed(cells))


def test_half_precision_is_read_in_full(checkpoints, cells, tmp_path, make):
    BertForMaskedLM.from_pretrained(checkpoints / "v2").bfloat16().save_pretrained(tmp_path)
    model = Geneformer(tmp_path, TOKENS["v2"], MEDIANS, hidden_state=2, device="cpu", progress=False)
    found = model.embed(cells)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, make().embed(cells), atol=0.1)


def symbols(cells):
    cells.var_names = [f"S{i}" for i in range(N_GENES)]


def few_known(cells):
    cells.var_names = [*IDS[:20], *(f"S{i}" for i in range(20, N_GENES))]


def fractions(cells):
    cells.X.data[[7, 9]] = 0.5
    cells.X.data[-1] = -1


def scaled(cells):
    cells.X = cells.X.toarray() - 1


def missing(cells):
    cells.X.data[3] = np.nan


def nothing(cells):
    cells.obs_names = [f"cell{i}" for i in range(N_CELLS)]
    counts = cells.X.toarray()
    counts[[2, 5]] = 0
    cells.X = counts


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (
            symbols,
            ValueError,
            r"0 of the 56 genes in adata.var_names \('S0', 'S1', 'S2', ... \(56 in all\)\) are among the 56 .* by Ensembl "
            r"ids: 0% .* less than min_share=0.5. Pass gene_ids=.* or gene_names=",
        ),
        (few_known, ValueError, "20 of the 56 genes .*: 36% of what could be"),
        (
            fractions,
            ValueError,
            r"adata.X does not hold counts, which Geneformer reads: 3 of the 1344 values .* \(0.5 of 'ENSG\d+', for one\). "
            "Pass layer=",
        ),
        (scaled, ValueError, "adata.X does not hold counts, .* negative or not whole .-1"),
        (missing, ValueError, "adata.X has 1 NaN"),
        (
            nothing,
            ValueError,
            "2 of 24 cells have no count in a gene that the model knows: 'cell2', 'cell5'. Remove them",
        ),
    ],
    ids=["symbols", "few", "fractions", "scaled", "NaN", "empty"],
)
def test_cells_that_cannot_be_read(make, cells, compare, spoil, error, message):
    spoil(cells)
    model, before = make(), compare.state(cells)
    for call in (model.tokenize, model.embed, lambda data: model.intervene(np.zeros((N_CELLS, D)), data)):
        with pytest.raises(error, match=message):
            call(cells)
    compare.assert_same(before, compare.state(cells))


def test_share_of_many_genes_and_of_few(make, cells):
    """All of the model's genes among many others are enough; so are a few, if the model knows them."""
    others = ad.AnnData(
        sparse.csr_matrix((N_CELLS, 500)), var=pd.DataFrame(index=[f"S{i}" for i in range(500)]), obs=cells.obs
    )
    many = ad.concat([cells, others], axis=1)
    np.testing.assert_array_equal(make().embed(many), make().embed(cells))
    assert make().embed(cells[:, :5].copy()).shape == (N_CELLS, D)
    few_known(cells)
    assert make(min_share=0.3).embed(cells).shape == (N_CELLS, D)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"gene_ids": "gene_id"}, KeyError, "adata.var has no 'gene_id'; it has none"),
        ({"layer": "counts"}, KeyError, "adata.layers has no 'counts'"),
    ],
    ids=["ids", "layer"],
)
def test_slots_that_are_not_there(make, cells, settings, error, message):
    with pytest.raises(error, match=message):
        make(**settings).embed(cells)


@pytest.mark.parametrize("shape", [(N_CELLS, D + 1), (N_CELLS - 1, D), (D,)])
def test_steps_of_another_shape(make, cells, shape):
    with pytest.raises(ValueError, match=r"step has the shape \(.*; expected 24 cells × the 32 dimensions"):
        make().intervene(np.zeros(shape), cells)


def test_what_there_is_not(make, cells):
    with pytest.raises(NotImplementedError, match=r"no decoder: .* model.intervene\(step, data\)"):
        make().decode(np.zeros((N_CELLS, D)), cells)
    with pytest.raises(ValueError, match="hidden_state=3 is the last: no layer leads from its '<cls>' to the genes"):
        make(pool="cls", hidden_state=-1).intervene(np.zeros((N_CELLS, D)), cells)
    with pytest.raises(ValueError, match="out='genes.npy' is where genes are kept. Pass embed_genes=True"):
        make().embed(cells, out="genes.npy")
    with pytest.raises(TypeError, match="Geneformer reads one modality: pass mdata.name., of 'rna'"):
        make().embed(mudata.MuData({"rna": cells}))


# ---- Manners


def test_loading_leaves_no_trace(make, capfd):
    level, shown = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    before = torch.random.get_rng_state()
    make()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == (level, shown)
    assert capfd.readouterr() == ("", "")


def test_what_is_logged(make, cells, log):
    import scanpy as sc

    sc.settings.verbosity = "info"
    cells.var_names = [*IDS[:50], *(f"S{i}" for i in range(6))]
    make(hidden_state=-2).embed(cells)
    assert "hidden state 2 of 0 to 3, 32 dimensions, the 30 highest ranks of 56 genes" in log()
    assert "50 of 56 genes are among the 56 that Geneformer knows" in log()
