"""ReLoRA as its paper has it, over dense float32 weights that take each update. Lialin et al. 2023, arXiv:2307.05695, algorithm 1."""

import math

import torch
from torch import Tensor, nn
from torch.func import functional_call

# Large beside the usual 1e-8: where a moment has just been set to zero, Adam would make whole steps of rounding errors.
EPS = 1e-3


def losses_and_weights(
    model: nn.Module,
    start: dict[str, tuple[Tensor, Tensor]],
    batches: Tensor,
    scaling: float,
    rates: list[float],
    restarts: dict[int, int],
    pruned: float,
) -> tuple[list[float], dict[str, Tensor]]:
    """Return the loss of each step, and the dense weights in the end with the last update in them.

    ``start``: A [R, in], B [out, R] of each linear; ``restarts``: the seed from which A is drawn anew after each step that has one.
    """
    names = list(start)
    weights = {name: model.get_submodule(name).weight.detach().clone() for name in names}
    factors = {name: [nn.Parameter(t.clone()) for t in pair] for name, pair in start.items()}
    optimizer = torch.optim.AdamW([p for pair in factors.values() for p in pair], weight_decay=0, eps=EPS)
    losses = []

    def adapted() -> dict[str, Tensor]:
        return {f"{name}.weight": weights[name] + scaling * factors[name][1] @ factors[name][0] for name in names}

    for step, (ids, rate) in enumerate(zip(batches, rates, strict=True), start=1):
        loss = functional_call(model, adapted(), (), {"input_ids": ids, "labels": ids}).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        if step in restarts:
            weights = {name: adapted()[f"{name}.weight"].detach() for name in names}
            generator = torch.Generator().manual_seed(restarts[step])
            for A, B in factors.values():
                A.data = nn.init.kaiming_uniform_(torch.empty_like(A), a=math.sqrt(5), generator=generator)
                B.data.zero_()
                for p in (A, B):
                    first = optimizer.state[p]["exp_avg"].abs()
                    least = first.flatten().sort().values[: round(pruned * first.numel())]
                    if len(least):
                        for moment in ("exp_avg", "exp_avg_sq"):
                            optimizer.state[p][moment][first <= least[-1]] = 0
    return losses, {name: weight.detach() for name, weight in adapted().items()}
