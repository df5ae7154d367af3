"""Embeddings from counts of words."""

import pytest
import torch
import torch.nn.functional as F

from foster_lib.errors import FosterError
from foster_lib.lsa import LsaEncoder

TEXTS = ["red apple pie", "green apple pie", "steel hammer", "iron hammer and steel", "red apple pie", "pie pie x"]


def test_texts_that_share_words_are_near(dataset):
    embedded = LsaEncoder(4).embed(TEXTS)
    near = F.normalize(embedded, dim=1) @ F.normalize(embedded, dim=1).T
    assert embedded.shape == (6, 4) and embedded.dtype == torch.float32
    assert near[0, 4] > 0.999 and near[0, 1] > near[0, 2] and near[2, 3] > near[2, 0]
    assert torch.equal(embedded, LsaEncoder(4).embed(TEXTS))


def test_inner_products_are_those_of_the_weighted_counts():
    """With all directions kept nothing is lost: against scikit-learn's table itself."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    counts = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\w+").fit_transform(TEXTS).toarray()
    embedded = LsaEncoder(100).embed(TEXTS).numpy()
    assert embedded.shape == (6, 5)  # five different texts
    assert abs(embedded @ embedded.T - counts @ counts.T).max() < 1e-5


def test_the_catalogue_is_frozen_and_mistakes_are_named():
    catalogue = LsaEncoder(3).catalogue(TEXTS)
    assert catalogue.n_items == 6 and catalogue.width == 3 and not list(catalogue.parameters())
    with pytest.raises(FosterError, match="tuned_layers=1"):
        LsaEncoder().catalogue(TEXTS, tuned_layers=1)
    with pytest.raises(FosterError, match="no words"):
        LsaEncoder().embed(["!", "?"])
    with pytest.raises(FosterError, match="two items"):
        LsaEncoder().embed(["one"])
