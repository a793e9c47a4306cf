"""GaLore's algorithm 2 over AdamW, one matrix at a time: Zhao et al. 2024, arXiv:2403.03507, section 3 and its algorithms 1 and 2."""

import torch
from torch import Tensor


class GaLoreAdamW:
    """One weight [m, n], its projector P and the two moments of its low-rank gradient; the whole of GaLore without any care for memory."""

    def __init__(self, weight: Tensor, rank: int, update_every: int, scale: float, lr: float, decay: float = 0.0):
        self.weight, self.rank, self.update_every, self.scale, self.lr, self.decay = weight.clone(), rank, update_every, scale, lr, decay
        self.steps, self.first, self.second, self.projector = 0, 0.0, 0.0, None

    def step(self, gradient: Tensor, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        """Update the weight by its whole gradient."""
        is_tall = gradient.shape[0] >= gradient.shape[1]
        if self.steps % self.update_every == 0:
            left, _, right = torch.linalg.svd(gradient, full_matrices=False)
            rows = right[: self.rank] if is_tall else left[:, : self.rank].T
            # A singular vector may be turned round. Here its largest element is positive.
            self.projector = torch.stack([row * row[row.abs().argmax()].sign() for row in rows])
        low = gradient @ self.projector.T if is_tall else self.projector @ gradient
        self.steps += 1
        self.first = betas[0] * self.first + (1 - betas[0]) * low
        self.second = betas[1] * self.second + (1 - betas[1]) * low.square()
        first, second = self.first / (1 - betas[0] ** self.steps), self.second / (1 - betas[1] ** self.steps)
        step = first / second.sqrt()
        self.weight -= self.lr * self.scale * (step @ self.projector if is_tall else self.projector.T @ step)
        self.weight -= self.lr * self.decay * self.weight
