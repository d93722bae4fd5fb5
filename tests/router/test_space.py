"""The space of embeddings, against the covariance within topics taken whole."""

import numpy as np
import pytest
import torch

from polymerge.router.space import SHRINKAGE, fit_space


def test_texts_of_one_topic_differ_less_as_the_shrunk_covariance_within_topics_says() -> None:
    rng = np.random.default_rng(0)
    topics = np.repeat([0, 1, 2, -1], [20, 20, 20, 5])
    raw = (rng.standard_normal((65, 12)) * np.linspace(0.2, 3, 12) + 2 * topics[:, None]).astype(np.float32)
    space, plain = fit_space(raw, topics), fit_space(raw)
    vectors = torch.from_numpy(plain(raw)).double()
    within = torch.cat([vectors[topics == n] - vectors[topics == n].mean(0) for n in (0, 1, 2)])
    covariance = within.T @ within / len(raw)
    shrunk = (1 - SHRINKAGE) * covariance + SHRINKAGE * covariance.trace() / 12 * torch.eye(12)
    values, axes = torch.linalg.eigh(shrunk)
    expected = vectors @ axes @ torch.diag(values**-0.5) @ axes.T
    expected /= torch.linalg.norm(expected, dim=1, keepdim=True)
    assert np.allclose(space(raw), expected.numpy(), atol=1e-4)


def test_without_topics_or_with_one_text_of_each_no_axis_is_smaller() -> None:
    raw = np.random.default_rng(1).standard_normal((6, 4)).astype(np.float32)
    assert len(fit_space(raw).axes) == 0
    assert np.array_equal(fit_space(raw, np.arange(6))(raw), fit_space(raw)(raw))


def test_axes_are_read_off_some_rows_where_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    topics = np.repeat([0, 1], 200)
    raw = (rng.standard_normal((400, 6)) * np.linspace(0.2, 3, 6) + topics[:, None]).astype(np.float32)
    whole = fit_space(raw, topics)(raw)
    monkeypatch.setattr("polymerge.router.space.ROWS", 100)
    some = fit_space(raw, topics)(raw)
    assert not np.array_equal(some, whole)
    assert np.allclose(some, whole, atol=0.15) and (some * whole).sum(1).mean() > 0.995
