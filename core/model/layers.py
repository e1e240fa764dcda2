"""Building blocks with the initialisation of the Deformable DETR transformer."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name everybody knows

from core.model.linear import FastLinear


class Linear(FastLinear):
    """A linear map whose weight starts as Xavier uniform; the bias keeps torch's default, as in the reference."""

    def reset_parameters(self) -> None:
        """Draw the weight and bias."""
        super().reset_parameters()
        nn.init.xavier_uniform_(self.weight)


class FeedForward(nn.Module):
    """Two linear maps with a ReLU between, residual, LayerNorm after the sum."""

    def __init__(self, *, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = Linear(dim, hidden)
        self.linear2 = Linear(hidden, dim)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., C) to (..., C)."""
        return self.norm(x + self.dropout2(self.linear2(self.dropout1(F.relu(self.linear1(x))))))


class BoxMLP(nn.Module):
    """DETR's box head. Its last layer starts at zero, so the first boxes are the references (Deformable DETR).

    Without `zero_start` it starts as torch's linear maps do (DETR).
    """

    def __init__(self, dim: int, *, zero_start: bool = True) -> None:
        super().__init__()
        self.hidden = MLP(dim, dim, dim)
        self.last = FastLinear(dim, 4)
        self.zero_start = zero_start

    def reset_parameters(self) -> None:
        """Set the last layer to zero, if so asked."""
        if self.zero_start:
            nn.init.zeros_(self.last.weight)
            nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., C) to logits of boxes (..., 4), never of half precision."""
        logits = self.last(F.relu(self.hidden(x)))
        return logits if logits.dtype == torch.float64 else logits.float()


class ClassHead(FastLinear):
    """Class logits; with `prior` each class starts at a probability of 0.01 (arXiv:1708.02002, section 3.3)."""

    PRIOR_LOGIT = -4.595119850134589  # log(0.01 / 0.99)

    def __init__(self, dim: int, num_logits: int, *, prior: bool = True) -> None:
        self.prior = prior
        super().__init__(dim, num_logits)

    def reset_parameters(self) -> None:
        """Draw the weight, set the bias."""
        super().reset_parameters()
        if self.prior:
            nn.init.constant_(self.bias, self.PRIOR_LOGIT)


class MLP(nn.Module):
    """Linear maps with ReLU between."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(FastLinear(*pair) for pair in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., sizes[0]) to (..., sizes[-1])."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)
