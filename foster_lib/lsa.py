"""`LsaEncoder`: item texts without a language model, in `TextEncoder`'s place."""

from __future__ import annotations

import torch
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor

from foster_lib.encoder import FrozenCatalogue
from foster_lib.errors import FosterError


class LsaEncoder:
    """Latent semantic analysis (Deerwester et al., 1990): weighted word counts and their leading singular vectors.

    It is fitted on the texts it embeds, so it needs no weights and no download, and knows a word only by the other
    words that it stands with.

    Parameters
    ----------
    dimensions : int
        Width of an embedding; fewer where the texts do not have as many independent directions.
    """

    name = "lsa"

    def __init__(self, dimensions: int = 256):
        self.dimensions = dimensions

    def embed(self, texts: list[str], **options) -> Tensor:
        """Embeddings of all texts, (len(texts), at most `dimensions`) float32; `options` of `TextEncoder` do nothing.

        Raises
        ------
        FosterError
            If no text has a word.
        """
        try:
            counts = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\w+").fit_transform(texts)
        except ValueError as error:
            raise FosterError("the item texts hold no words, so LSA cannot embed them: use another encoder.") from error
        size = min(self.dimensions, min(counts.shape) - 1)
        if size < 1:
            raise FosterError("LSA needs at least two items and two different words in their texts.")
        return torch.from_numpy(TruncatedSVD(size, n_iter=7, random_state=0).fit_transform(counts)).float()

    def catalogue(
        self, texts: list[str], tuned_layers: int | str = 0, device: str = "cpu", **options
    ) -> FrozenCatalogue:
        """As `TextEncoder.catalogue`; there are no layers to tune."""
        if tuned_layers != 0:
            raise FosterError(f"tuned_layers={tuned_layers} does not fit encoder 'lsa': it has no layers that learn.")
        return FrozenCatalogue(self.embed(texts)).to(device)
