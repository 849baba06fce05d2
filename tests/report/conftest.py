"""Reading a report back, written from what the encoders say they write."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pytest

ARCHIVE = Path(__file__).parents[1] / "archives" / "schema_1.h5ad"


@pytest.fixture(scope="session")
def _archived():
    return ad.read_h5ad(ARCHIVE)


@pytest.fixture
def archived(_archived):
    """350 real cells with stored results of every verb, the same on every machine."""
    return _archived.copy()


class Decode:
    """Decoders of the packed parts of a page."""

    @staticmethod
    def varints(content: bytes, n: int) -> tuple[list[int], bytes]:
        values = []
        at = 0
        for _ in range(n):
            value = shift = 0
            while content[at] & 0x80:
                value |= (content[at] & 0x7F) << shift
                at, shift = at + 1, shift + 7
            values.append(value | content[at] << shift)
            at += 1
        return values, content[at:]

    @staticmethod
    def cells(content: bytes, n: int) -> np.ndarray:
        steps, rest = Decode.varints(content, 2 * n)
        assert rest == b""
        signed = np.array([step // 2 if step % 2 == 0 else -(step + 1) // 2 for step in steps])
        return signed.reshape(2, n).cumsum(axis=1).T

    @staticmethod
    def points(content: bytes, n_features: int) -> list[tuple[list[int], list[int]]]:
        counts, content = Decode.varints(content, n_features)
        steps, levels = Decode.varints(content, sum(counts))
        assert len(levels) == sum(counts)
        ends = np.cumsum(counts)
        spans = [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]
        return [(np.cumsum(steps[span]).tolist(), list(levels[span])) for span in spans]


@pytest.fixture(scope="session")
def decode():
    """`decode.varints(content, n)`, `decode.cells(content, n)`, `decode.points(content, n_features)`."""
    return Decode
