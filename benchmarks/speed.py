"""Training speed beside plain torch, SAELens and dictionary_learning, as a share of what the matrix products alone allow.

The limit is the six products of one dense forward and backward step (x W_enc, a W_dec, r W_decᵀ, aᵀ r, gᵀ x, g W_encᵀ) into
preallocated arrays. Every round runs all contenders in turn and divides by the limit of that round; the table has the
medians over the rounds, and how many cores each contender kept busy. Two threads, float32, k = 32, 1,024 cells a step,
standardised normal data in memory. The other libraries get ready batches and run their own training step with their own
defaults; ours draws and scales its batches from the raw matrix within the time that is measured.

    pip install -r benchmarks/peers.txt
    python benchmarks/speed.py
    python benchmarks/speed.py --shape small --only ours topk --rounds 3
    python benchmarks/speed.py --device cuda --shape large huge --only ours plain

Libraries that are not installed are left out.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["OMP_NUM_THREADS"] = "2"  # for our own threads; those of torch are set below

import numpy as np
import torch
from tqdm import tqdm

from sae.core.architectures import ARCHITECTURES
from sae.core.backend import Settings
from sae.core.defaults import nested_groups
from sae.core.initial import initial_weights
from sae.core.preprocess import Scaling, fit_scaling
from sae.core.rows import shuffled_batches
from sae.core.train import make_backend

SHAPES = {
    "small": (20_000, 20, 1_000),
    "medium": (50_000, 50, 2_048),
    "large": (20_000, 512, 4_096),
    "huge": (100_000, 512, 16_384),
}
ON_CPU = ("small", "medium", "large")
K, L1, L0, BATCH, THREADS = 32, 1.0, 0.1, 1024, 2
WARM_UP = 3
BETWEEN_LOOKS = 10
"""Steps between two looks at the clock, for which a GPU has to be waited for."""
LIMIT = "6 products (limit)"
DISTRIBUTIONS = {"sae_lens": "sae-lens", "dictionary_learning": "dictionary-learning"}

Contender = Callable[[float], float]
"""Trains for about so many seconds and returns cells per second."""


@dataclass(frozen=True)
class Data:
    x: np.ndarray
    scaling: Scaling
    y: torch.Tensor
    n_features: int
    device: str


def simulate(n: int, d: int, n_features: int, device: str) -> Data:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((n, d)) + rng.standard_normal(d)).astype(np.float32)
    scaling = fit_scaling(x, "standardize")
    return Data(x, scaling, torch.from_numpy(scaling.transform(x)).to(device), n_features, device)


def now(device: str) -> float:
    """Read the clock when everything that was asked for is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def batches(y: torch.Tensor) -> Iterator[torch.Tensor]:
    while True:
        yield from y[: len(y) // BATCH * BATCH].split(BATCH)


def timed(step: Callable[[torch.Tensor], object], y: torch.Tensor) -> Contender:
    feed = batches(y)

    def run(seconds: float) -> float:
        for _ in range(WARM_UP):
            step(next(feed))
        looks = BETWEEN_LOOKS if y.is_cuda else 1
        n, start, elapsed = 0, now(y.device.type), 0.0
        while elapsed < seconds or n == 0:
            for _ in range(looks):
                step(next(feed))
            n, elapsed = n + looks, now(y.device.type) - start
        return n * BATCH / elapsed

    return run


def products(data: Data, *, which: int) -> Contender:
    """All six products, five without that of the pre-bias, or the encoder's alone."""
    d, h = data.y.shape[1], data.n_features
    W_enc, W_dec, a, r, g = (torch.randn(shape) for shape in ((d, h), (h, d), (BATCH, h), (BATCH, d), (BATCH, h)))
    pre, x_hat, grad_a, grad_W_dec, grad_W_enc, grad_x = (torch.empty_like(like) for like in (a, r, a, W_dec, W_dec, r))

    def step(x: torch.Tensor) -> None:
        torch.mm(x, W_enc, out=pre)
        if which == 1:
            return
        torch.mm(a, W_dec, out=x_hat)
        torch.mm(r, W_dec.T, out=grad_a)
        torch.mm(a.T, r, out=grad_W_dec)
        torch.mm(g.T, x, out=grad_W_enc)
        if which == 6:
            torch.mm(g, W_enc.T, out=grad_x)

    return timed(step, data.y)


def plain_torch(data: Data, *, topk: bool) -> Contender:
    directions = torch.nn.functional.normalize(torch.randn(data.n_features, data.y.shape[1]), dim=1)
    W_dec, W_enc = directions.requires_grad_(), directions.detach().T.clone().requires_grad_()
    b_enc, b_dec = (torch.zeros(width, requires_grad=True) for width in directions.shape)
    optimizer = torch.optim.Adam([W_enc, b_enc, W_dec, b_dec], lr=1e-3, fused=True)

    def step(x: torch.Tensor) -> None:
        pre = torch.addmm(b_enc, x, W_enc)
        if topk:
            values, indices = pre.topk(K, dim=1, sorted=False)
            a = torch.zeros_like(pre).scatter(1, indices, values.relu())
        else:
            a = pre.relu()
        loss = (torch.addmm(b_dec, a, W_dec) - x).square().sum(dim=1).mean()
        if not topk:
            loss = loss + L1 * a.sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            W_dec.div_(W_dec.norm(dim=1, keepdim=True))

    return timed(step, data.y)


def sae_lens(data: Data, *, name: str, **settings: object) -> Contender:
    import sae_lens
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    config = getattr(sae_lens, f"{name}TrainingSAEConfig")(d_in=data.y.shape[1], d_sae=data.n_features, **settings)
    # Without lr_end the trainer refuses to start; the constant schedule does not read it.
    training = SAETrainerConfig(total_training_samples=10**9, train_batch_size_samples=BATCH, lr_end=3e-5)
    trainer = SAETrainer(training, getattr(sae_lens, f"{name}TrainingSAE")(config), batches(data.y))

    def step(x: torch.Tensor) -> None:
        trainer.step(x)
        trainer.n_training_steps += 1

    return timed(step, data.y)


def dictionary_learning(data: Data, *, name: str, **settings: object) -> Contender:
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.standard import StandardTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    kind = {"TopK": TopKTrainer, "BatchTopK": BatchTopKTrainer, "Standard": StandardTrainer}[name]
    trainer = kind(
        steps=10**6,
        activation_dim=data.y.shape[1],
        dict_size=data.n_features,
        layer=0,
        lm_name="",
        device=data.device,
        **settings,
    )
    n = 0

    def step(x: torch.Tensor) -> None:
        nonlocal n
        trainer.update(n, x)
        n += 1

    return timed(step, data.y)


def ours(data: Data, *, architecture: str) -> Contender:
    """Time our training step with the drawing and scaling of its batch, which the peers get ready-made.

    k is 32 from the start here, as the peers': in tl.fit it falls from 96 over the first 30 % of the steps.
    """
    h, sparsity = data.n_features, ARCHITECTURES[architecture].sparsity
    settings = Settings(
        architecture=architecture,
        n_features=h,
        groups=nested_groups(h, data.scaling.n_effective) if architecture == "matryoshka" else (h,),
        k=K if sparsity == "k" else None,
        l1=L1 if sparsity == "l1" else None,
        l0=L0 if sparsity == "l0" else None,
        learning_rate=1e-3,
        steps=1,
        batch_size=BATCH,
        seed=0,
        device=data.device,
    )

    def run(seconds: float) -> float:
        y = data.scaling.transform(data.x[:2048])
        backend = make_backend(initial_weights(y, data.scaling.spread, settings), settings)
        stream = shuffled_batches(data.x, np.arange(len(data.x)), BATCH, seed=0)
        n, start = 0, 0.0
        while n <= WARM_UP or time.perf_counter() - start < seconds:
            if n == WARM_UP:
                start = time.perf_counter()
            backend.step(data.scaling.transform(next(stream)), n, 1e-3)
            n += 1
        elapsed = time.perf_counter() - start
        backend.close()
        return (n - WARM_UP) * BATCH / elapsed

    return run


CONTENDERS: dict[str, Callable[[Data], Contender]] = {
    LIMIT: partial(products, which=6),
    "5 products": partial(products, which=5),
    "1 product, the encoder's": partial(products, which=1),
    "plain torch topk": partial(plain_torch, topk=True),
    "plain torch l1": partial(plain_torch, topk=False),
    "sae_lens topk": partial(sae_lens, name="TopK", k=K),
    # Sparse activations and the default rescaling together fail in the backward pass on the CPU.
    "sae_lens topk, sparse": partial(
        sae_lens, name="TopK", k=K, use_sparse_activations=True, rescale_acts_by_decoder_norm=False
    ),
    "sae_lens batchtopk": partial(sae_lens, name="BatchTopK", k=K),
    "sae_lens standard": partial(sae_lens, name="Standard", l1_coefficient=L1),
    "dictionary_learning topk": partial(dictionary_learning, name="TopK", k=K),
    "dictionary_learning batchtopk": partial(dictionary_learning, name="BatchTopK", k=K),
    "dictionary_learning standard": partial(dictionary_learning, name="Standard", l1_penalty=L1),
} | {
    f"ours {architecture}": partial(ours, architecture=architecture)
    for architecture in ("topk", "batchtopk", "matryoshka", "vanilla", "relu", "jumprelu", "gated")
    if architecture in ARCHITECTURES
}


def chosen(only: list[str] | None) -> list[str]:
    missing = {module for module in DISTRIBUTIONS if importlib.util.find_spec(module) is None}
    for module in sorted(missing):
        print(f"{module} is not installed and left out")
    return [
        name
        for name in CONTENDERS
        if name.split()[0] not in missing and (only is None or name == LIMIT or any(part in name for part in only))
    ]


def measure(shape: str, names: list[str], rounds: int, seconds: float, device: str) -> None:
    n, d, n_features = SHAPES[shape]
    torch.manual_seed(0)
    data = simulate(n, d, n_features, device)
    contenders = {name: CONTENDERS[name](data) for name in names}
    speeds: dict[str, list[float]] = {name: [] for name in names}
    cores: dict[str, list[float]] = {name: [] for name in names}
    with tqdm(total=(rounds + 1) * len(names), desc=shape, leave=False, disable=None) as bar:
        # Round zero is thrown away: it compiles, allocates and takes the first steps.
        for round_ in range(rounds + 1):
            for name, run in contenders.items():
                wall, cpu = time.perf_counter(), time.process_time()
                speed = run(seconds if round_ else 0)
                if round_:
                    speeds[name].append(speed)
                    cores[name].append((time.process_time() - cpu) / (time.perf_counter() - wall))
                bar.update()
    print(f"\n{shape}: {n:,} x {d} -> {n_features:,}")
    print(f"{'contender':<30}{'samples/s':>12}{'of limit':>10}{'min - max':>18}{'cores':>7}")
    for name in names:
        ratios = [speed / limit for speed, limit in zip(speeds[name], speeds[LIMIT], strict=True)]
        spread = f"{min(ratios):.3f} - {max(ratios):.3f}"
        speed, ratio, core = (statistics.median(values) for values in (speeds[name], ratios, cores[name]))
        print(f"{name:<30}{speed:>12,.0f}{ratio:>10.3f}{spread:>18}{core:>7.2f}")
    if device == "cpu" and statistics.median(cores[LIMIT]) < 0.9 * THREADS:
        print(f"The products got less than {THREADS} cores: something else is running, do not trust these ratios.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(ON_CPU))
    parser.add_argument("--only", nargs="+", help="contenders with one of these in their name")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.set_default_device(options.device)
    selected = chosen(options.only)
    used = [DISTRIBUTIONS[module] for module in DISTRIBUTIONS if any(name.startswith(module) for name in selected)]
    print(", ".join(f"{package} {importlib.metadata.version(package)}" for package in ("scsae", "torch", *used)))
    for shape_ in options.shape:
        measure(shape_, selected, options.rounds, options.seconds, options.device)
