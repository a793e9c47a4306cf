"""The LoRA paper's figures of subspaces, restated over dense matrices in numpy. Hu et al. 2021, arXiv:2106.09685."""

import numpy as np


def phi(A_one: np.ndarray, A_other: np.ndarray, i: int, j: int) -> float:
    """Section 7.2, equation 4: ||U_1^i^T U_2^j||_F^2 / min(i, j), U the right-singular vectors of the two A [R, in]."""
    one, other = np.linalg.svd(A_one)[2][:i].T, np.linalg.svd(A_other)[2][:j].T
    return float(np.linalg.norm(one.T @ other) ** 2 / min(i, j))


def projection_distance(one: np.ndarray, other: np.ndarray) -> float:
    """Appendix G: the projection metric between the spans of orthonormal columns, from the cosines of their principal angles."""
    cosines = np.linalg.svd(one.T @ other, compute_uv=False)
    return float(np.sqrt(min(one.shape[1], other.shape[1]) - (cosines**2).sum()))


def amplification(update: np.ndarray, weight: np.ndarray, r: int) -> tuple[float, float, float]:
    """Section 7.3, table 7: ||dW||_F, ||U^T W V||_F with U, V of dW, and with U, V of W, r directions each."""
    U, _, V = np.linalg.svd(update)
    own_U, _, own_V = np.linalg.svd(weight)
    within = np.linalg.norm(U[:, :r].T @ weight @ V[:r].T)
    return float(np.linalg.norm(update)), float(within), float(np.linalg.norm(own_U[:, :r].T @ weight @ own_V[:r].T))


def effective_rank(matrix: np.ndarray) -> float:
    """Roy and Vetterli 2007, definition 1: exp of the Shannon entropy of the singular values over their sum."""
    sigma = np.linalg.svd(matrix, compute_uv=False)
    share = sigma[sigma > 1e-12 * sigma[0]] / sigma.sum()
    return float(np.exp(-(share * np.log(share)).sum()))
