"""What an encoder reads besides the picture: "first the question, then the text".

A module called with the source of the learned queries; returns embeddings (Q, C) that every token may attend to.
"""

import torch
from torch import Tensor, nn

from core.model.queries import LearnedQueries


class LearnedQuestion(nn.Module):
    """The queries that the decoder will ask with: the encoder sees them, and they learn from what it makes of them."""

    def forward(self, source: LearnedQueries) -> Tensor:
        """Return content and position of the queries, (Q, C)."""
        return source.question()


class ConstantQuestion(nn.Module):
    """The control: noise of the same shape that never changes, with as many parameters around it."""

    words: Tensor

    def __init__(self, *, num_words: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("words", torch.empty(num_words, dim))

    def reset_parameters(self) -> None:
        """Draw the noise, N(0, 1)."""
        nn.init.normal_(self.words)

    def forward(self, source: LearnedQueries) -> Tensor:  # noqa: ARG002 - one signature for both
        """Return the noise, (Q, C)."""
        return self.words
