"""SAELens' folders: against SAELens' own equations, written out here in float64 and unfolded."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import sae
from sae.io._saelens import NOT_FOLDED, NOT_PLAIN

from .test_io_sae import TYPED, damaged, raw_file, swapped

D, H, K, N = 6, 20, 3, 200
FILE = "sae_weights.safetensors"
FUZZ = 200 * int(os.environ.get("SAE_FUZZ") or 1)


def new(architecture, *, seed=0, dtype=np.float32, **config):
    """Random weights and a configuration of version 6."""
    rng = np.random.default_rng(seed)
    names = {
        "gated": ["b_gate", "b_mag", "r_mag"],
        "jumprelu": ["b_enc", "threshold"],
        "batchtopk": ["b_enc"],
        "matryoshka_batchtopk": ["b_enc"],
    }.get(architecture, ["b_enc"])
    weights = {name: rng.normal(size=H) for name in names}
    weights |= {"W_enc": rng.normal(size=(D, H)), "W_dec": rng.normal(size=(H, D)), "b_dec": rng.normal(size=D)}
    if architecture.endswith("batchtopk"):
        weights["topk_threshold"] = np.array(0.7)
    more = {"k": K} if "topk" in architecture else {}
    said = {
        "architecture": architecture,
        "d_in": D,
        "d_sae": H,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.18.0", "model_name": "a model", "hook_name": "layer.3"},
    }
    return {name: np.asarray(value, dtype) for name, value in weights.items()}, said | more | config


def save(folder, weights, config):
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / FILE)
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def by_their_equations(weights, config, x):
    """Encode and decode as SAELens 6 does, step by step: activations (n, h) and reconstruction (n, d)."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    x_in = x - w["b_dec"] * config["apply_b_dec_to_input"]
    norm = np.linalg.norm(w["W_dec"], axis=1) if config.get("rescale_acts_by_decoder_norm") else np.ones(H)
    architecture = config["architecture"]
    if architecture == "gated":
        is_open = x_in @ w["W_enc"] + w["b_gate"] > 0
        a = is_open * np.maximum(x_in @ (w["W_enc"] * np.exp(w["r_mag"])) + w["b_mag"], 0)
    else:
        pre = (x_in @ w["W_enc"] + w["b_enc"]) * norm
        if architecture == "topk":
            kept = np.zeros(pre.shape, dtype=bool)
            np.put_along_axis(kept, np.argsort(-pre, axis=1)[:, : config["k"]], True, axis=1)
        elif architecture == "jumprelu":
            kept = pre > w["threshold"]
        elif architecture.endswith("batchtopk"):
            kept = pre > w["topk_threshold"]
        else:
            kept = True
        a = np.maximum(pre, 0) * kept
    return a, (a / norm) @ w["W_dec"] + w["b_dec"]


def cells(n=N):
    return np.random.default_rng(5).normal(1, 2, size=(n, D)).astype(np.float32)


def assert_as_theirs(folder, weights, config, tolerance=1e-5):
    model = sae.get.model(sae.io.read_saelens(folder))
    found = model.encode(cells()).activations
    a, x_hat = by_their_equations(weights, config, cells().astype(np.float64))
    np.testing.assert_array_equal(found.toarray() > 0, a > 0)
    np.testing.assert_allclose(found.toarray(), a, rtol=tolerance, atol=tolerance * a.max())
    np.testing.assert_allclose(model.decode(found), x_hat, rtol=tolerance, atol=tolerance * np.abs(x_hat).max())
    return model


ARCHITECTURES = {
    "standard": ("relu", {}),
    "topk": ("topk", {}),
    "topk, rescaled": ("topk", {"rescale_acts_by_decoder_norm": True}),
    "jumprelu": ("threshold", {}),
    "gated": ("threshold", {}),
    "batchtopk": ("threshold", {}),
    "batchtopk, rescaled": ("threshold", {"rescale_acts_by_decoder_norm": True}),
    "matryoshka_batchtopk": ("threshold", {"rescale_acts_by_decoder_norm": True, "matryoshka_widths": [10, 20]}),
}


@pytest.mark.parametrize("centred", [False, True], ids=["plain", "b_dec applied"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name, centred, tmp_path):
    activation, more = ARCHITECTURES[name]
    weights, config = new(name.split(",")[0], apply_b_dec_to_input=centred, **more)
    model = assert_as_theirs(save(tmp_path / "a", weights, config), weights, config)
    assert model.activation == activation


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_types(dtype, tmp_path):
    weights, config = new("jumprelu", dtype=dtype)
    assert_as_theirs(save(tmp_path / "a", weights, config), weights, config)


def test_a_decoder_of_zeros_is_a_dead_feature(tmp_path):
    weights, config = new("topk", rescale_acts_by_decoder_norm=True)
    weights["W_dec"][4] = 0
    model = sae.get.model(sae.io.read_saelens(save(tmp_path / "a", weights, config)))
    assert model.encode(cells()).activations[:, 4].nnz == 0


OLD = {
    "architecture": "standard",
    "d_in": D,
    "d_sae": H,
    "dtype": "torch.float32",
    "device": "cuda",
    "model_name": "gpt2-small",
    "hook_point": "blocks.8.hook_resid_pre",
    "hook_point_layer": 8,
    "activation_fn_str": "relu",
    "apply_b_dec_to_input": True,
    "finetuning_scaling_factor": False,
    "normalize_activations": "none",
    "sae_lens_training_version": "3.2.1",
}


def test_versions_up_to_5(tmp_path):
    weights, _ = new("standard")
    folder = save(tmp_path / "relu", weights, OLD)
    assert_as_theirs(folder, weights, OLD)
    params = sae.io.read_saelens(folder).uns["sae"]["params"]
    assert params["use_rep"] == params["saelens_hook"] == "blocks.8.hook_resid_pre"
    assert (params["saelens_version"], params["version"]) == ("3.2.1", "SAELens 3.2.1")

    config = OLD | {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}
    folder = save(tmp_path / "topk", weights, config)
    assert assert_as_theirs(folder, weights, config | {"architecture": "topk", "k": K}).k == K

    # Before there was a choice, all were centred and had a ReLU.
    least = {name: OLD[name] for name in ("d_in", "d_sae")} | {"normalize_activations": False}
    assert_as_theirs(save(tmp_path / "least", weights, least), weights, OLD)


@pytest.mark.parametrize("name", ["finetuning_scaling_factor", "scaling_factor"])
def test_fine_tuned_scales(name, tmp_path):
    weights, _ = new("standard")
    config, scales = OLD | {"finetuning_scaling_factor": True}, np.linspace(0.5, 2, H, dtype=np.float32)
    model = sae.get.model(sae.io.read_saelens(save(tmp_path / "a", weights | {name: scales}, config)))
    a, _ = by_their_equations(weights, config, cells().astype(np.float64))
    np.testing.assert_allclose(
        model.decode(model.encode(cells()).activations), (a * scales) @ weights["W_dec"] + weights["b_dec"], atol=2e-4
    )
    ones = np.ones(H, np.float32)
    assert_as_theirs(save(tmp_path / "b", weights | {name: ones}, OLD), weights, OLD)
    with pytest.raises(ValueError, match="says that there is none"):
        sae.io.read_saelens(save(tmp_path / "c", weights | {name: scales}, OLD))


# ---- In use


@pytest.fixture
def adata(make_adata):
    return make_adata()


@pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning")
def test_cells_are_encoded(adata, tmp_path):
    weights, config = new("jumprelu")
    read = sae.io.read_saelens(save(tmp_path / "a", weights, config), use_rep="X_pca")
    sae.tl.encode(adata, reference=read, progress=False)
    a, _ = by_their_equations(weights, config, adata.obsm["X_pca"].astype(np.float64))
    np.testing.assert_allclose(adata.obsm["sae"].toarray(), a, rtol=1e-5, atol=1e-4)
    assert sae.get.features(adata)["n_cells"].sum() == adata.obsm["sae"].nnz
    assert sae.get.history(read).empty
    sae.io.write(read, tmp_path / "b")
    again = adata.copy()
    sae.tl.encode(again, reference=sae.io.read(tmp_path / "b"), progress=False)
    np.testing.assert_array_equal(again.obsm["sae"].toarray(), adata.obsm["sae"].toarray())


def test_one_has_to_say_what_it_reads(adata, tmp_path):
    read = sae.io.read_saelens(save(tmp_path / "a", *new("jumprelu")), key_added="other")
    assert list(read.uns) == ["other"]
    with pytest.raises(KeyError, match=r"no 'layer\.3'; it has 'X_pca'"):
        sae.tl.encode(adata, key="other", reference=read, progress=False)
    assert "other" not in adata.uns


# ---- Export


@pytest.mark.parametrize(
    ("architecture", "theirs"),
    {
        "topk": "topk",
        "batchtopk": "jumprelu",
        "matryoshka": "jumprelu",
        "jumprelu": "jumprelu",
        "gated": "jumprelu",
        "vanilla": "standard",
        "relu": "standard",
    }.items(),
)
def test_export(architecture, theirs, adata, tmp_path):
    sae.tl.fit(adata, architecture=architecture, n_features=H, steps=30, progress=False)
    sae.tl.encode(adata, progress=False)
    sae.io.write_saelens(adata, tmp_path / "a")
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == ["cfg.json", "sae_weights.safetensors"]
    config, weights = json.loads((tmp_path / "a" / "cfg.json").read_text()), load_file(tmp_path / "a" / FILE)
    assert (config["architecture"], config["d_in"], config["d_sae"]) == (theirs, D, H)
    assert weights["W_enc"].shape == (D, H) and weights["W_dec"].shape == (H, D)
    x = adata.obsm["X_pca"]
    a, x_hat = by_their_equations(weights, config, x.astype(np.float64))
    np.testing.assert_allclose(adata.obsm["sae"].toarray(), a, rtol=1e-5, atol=1e-5 * a.max())
    np.testing.assert_allclose(sae.get.model(adata).decode(adata.obsm["sae"]), x_hat, rtol=1e-4, atol=1e-4)
    back, ours = sae.io.read_saelens(tmp_path / "a").uns["sae"]["weights"], adata.uns["sae"]["weights"]
    for name in weights:
        np.testing.assert_array_equal(back[name], ours[name])


def test_export_of_a_modality(make_mudata, tmp_path):
    mdata = make_mudata()
    sae.tl.fit(mdata, mod="adt", n_features=16, steps=30, progress=False)
    sae.io.write_saelens(mdata, tmp_path / "a", mod="adt")
    np.testing.assert_array_equal(
        load_file(tmp_path / "a" / FILE)["W_enc"], mdata.mod["adt"].uns["sae"]["weights"]["W_enc"]
    )


def test_export_overwrites_nothing_else(adata, tmp_path):
    sae.tl.fit(adata, n_features=16, steps=30, progress=False)
    sae.io.write(adata, tmp_path / "ours")
    with pytest.raises(FileExistsError, match="not an SAE's folder"):
        sae.io.write_saelens(adata, tmp_path / "ours", overwrite=True)
    sae.io.write_saelens(adata, tmp_path / "a")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        sae.io.write_saelens(adata, tmp_path / "a")
    sae.io.write_saelens(adata, tmp_path / "a", overwrite=True)


# ---- What is refused

REFUSED = {
    **{
        kind: ({"architecture": kind}, f"architecture {kind!r}, which {reason}; those that can")
        for kind, reason in NOT_PLAIN.items()
    },
    **{
        kind: ({"normalize_activations": kind}, f"inputs are scaled {how}") for kind, how in NOT_FOLDED.items()
    },
    "another scaling": ({"normalize_activations": "magic"}, "in a way that is not known"),
    "scaled, said before": ({"normalize_activations": True}, "by a factor that the folder does not have. Fold it"),
    "another architecture": ({"architecture": "magic"}, "'magic', which is not known; those that can be read are"),
    "a list": ({"architecture": ["jumprelu"]}, "which is not known"),
    "version 7": ({"metadata": {"sae_lens_version": "7.0.1"}}, "versions up to 6 are known"),
    "no version": ({"metadata": {"sae_lens_version": "new"}}, "the version 'new' of SAELens"),
    "a number for the version": ({"metadata": {"sae_lens_version": 6}}, "as version a int"),
    "a hook that is none": ({"metadata": {"hook_name": ["a"]}}, "as hook_name a list"),
    "tanh": ({"activation_fn_str": "tanh-relu"}, "the activation function 'tanh-relu'"),
    "after TopK": ({"activation_fn_kwargs": {"postact_fn": "Identity"}}, "applies 'Identity' after TopK"),
    "no width": ({"d_in": None}, "as d_in 'None'"),
    "width true": ({"d_sae": True}, "as d_sae 'True'"),
    "another width": ({"d_in": D + 1}, r"'W_enc' of the shape \(6, 20\); cfg.json says \(7, 20\)"),
    "centred by half": ({"apply_b_dec_to_input": 0.5}, "as apply_b_dec_to_input '0.5'"),
    "another kind": ({"architecture": "gated"}, "has the tensors .*; a gated SAE has"),
    "TopK of none": ({"architecture": "topk", "k": 0}, "as k '0'"),
    "TopK of too many": ({"architecture": "topk", "k": H + 1}, "as k '21'"),
    "TopK of a share": ({"architecture": "topk", "k": 2.5}, "as k '2.5'"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_configurations_that_are_refused(change, message, tmp_path):
    weights, config = new("jumprelu")
    save(tmp_path / "a", weights, config | change)
    with pytest.raises(ValueError, match=message):
        sae.io.read_saelens(tmp_path / "a")


def test_weights_that_are_refused(tmp_path):
    weights, config = new("gated")
    broken = weights | {"W_dec": np.full_like(weights["W_dec"], np.inf)}
    with pytest.raises(ValueError, match="120 NaN or infinite values in 'W_dec'"):
        sae.io.read_saelens(save(tmp_path / "a", broken, config))
    large = weights | {"r_mag": np.full_like(weights["r_mag"], 800)}
    with pytest.raises(ValueError, match="'W_enc', .*would not be finite numbers of type float32"):
        sae.io.read_saelens(save(tmp_path / "a", large, config))
    (tmp_path / "a" / "cfg.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no 'cfg.json'"):
        sae.io.read_saelens(tmp_path / "a")
    (tmp_path / "a" / "cfg.json").write_text("[]")
    with pytest.raises(ValueError, match="expected the configuration"):
        sae.io.read_saelens(tmp_path / "a")


# ---- Anything at all


def test_anything_is_refused_or_does_no_harm(tmp_path):
    """SAELens saves no checksum: other weights that fit are read. Then they encode."""
    rng, refused = np.random.default_rng(0), 0
    x = cells(3)
    for number in range(FUZZ):
        kind = list(ARCHITECTURES)[number % len(ARCHITECTURES)]
        weights, config = new(kind.split(",")[0], **ARCHITECTURES[kind][1])
        folder = save(tmp_path / "a", weights, config)
        content, said = (folder / FILE).read_bytes(), json.dumps(config).encode()
        n = int.from_bytes(content[:8], "little")
        match rng.integers(4):
            case 0:
                (folder / FILE).write_bytes(damaged(content, rng))
            case 1:
                (folder / FILE).write_bytes(raw_file(swapped(json.loads(content[8 : 8 + n]), rng), content[8 + n :]))
            case 2:
                (folder / "cfg.json").write_bytes(damaged(said, rng))
            case 3:
                (folder / "cfg.json").write_text(json.dumps(swapped(config, rng)))
        try:
            model = sae.get.model(sae.io.read_saelens(folder))
            if model.n_inputs == D:
                model.decode(model.encode(x).activations)
        except TYPED as error:
            assert str(error)
            refused += 1
    assert refused > 0.3 * FUZZ
