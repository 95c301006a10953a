"""Spectra against numpy's SVD of the dense change."""

from __future__ import annotations

import numpy as np
import pytest
from support.adapters import llama, shake

import veneer
from veneer.adapt.attached import changes
from veneer.analyse.spectra import spectra


@pytest.mark.parametrize(("method", "options"), [("lora", {}), ("lora", {"init": "pissa"}), ("dora", {})])
def test_spectra_equal_the_dense_changes(method, options):
    model = veneer.attach(llama(), method, rank=3, **options)
    shake(model)
    found = spectra(model, "default")
    for s, (site, delta) in zip(found, changes(model, "default"), strict=True):
        values = np.linalg.svd(delta.delta(site).detach().numpy().astype(float), compute_uv=False)
        np.testing.assert_allclose(s.values, values[: len(s.values)], atol=1e-5)
        assert s.site == site.name and s.norm == pytest.approx(np.linalg.norm(values), rel=1e-4)
        p = values / values.sum()
        assert s.effective_rank == pytest.approx(np.exp(-(p * np.log(p + 1e-30)).sum()), rel=1e-2)
        share = np.cumsum(values**2) / (values**2).sum()
        assert s.energy_rank == int(np.argmax(share >= 0.9)) + 1
        assert s.relative == pytest.approx(
            np.linalg.norm(values) / np.linalg.norm(site.weight().detach().numpy()), rel=1e-4
        )


def test_nothing_changed_has_no_rank():
    s = spectra(veneer.attach(llama(), "lora", rank=2), "default")[0]
    assert s.norm == 0 and s.effective_rank == 0 and s.energy_rank == 0
