"""Token-chunked cross entropy: the loss over a vocabulary of V without ever holding [tokens, V] for all tokens.

The head and the loss run on ``chunk`` tokens at a time, and each chunk's gradient is taken at once, so that only one
chunk's logits live at any time, in forward and backward alike, and the head is not run a second time. Tokens without
a label never reach the head.
"""

import torch
from torch import Tensor, nn

from qlite.offload import sent

# Logits that are float32 at a time: 16 MiB.
PART = 1 << 22


def chunked_cross_entropy(head: nn.Module, hidden: Tensor, predicts: Tensor, targets: Tensor, denominator: float, chunk: int) -> Tensor:
    """Return the sum over the N trained tokens of -log p(token), divided by ``denominator``: a float32 scalar, in nats.

    hidden [B, T, D]; targets [N] the trained tokens, and predicts [N] the row-major places in [B, T] of the hidden states that
    predict them, both int64 on any device. Gradients reach ``hidden`` and every trainable tensor of ``head``.
    """
    used = hidden.reshape(-1, hidden.shape[-1]).index_select(0, sent(predicts, hidden.device))
    # Of a trained head the function would else compute a gradient in an evaluation, too: it cannot see whether one is wanted.
    params = tuple(p for p in head.parameters() if p.requires_grad and torch.is_grad_enabled())
    return _ChunkedLoss.apply(used, sent(targets, hidden.device), head, denominator, chunk, *params)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, targets: Tensor, head: nn.Module, denominator: float, chunk: int, *params: Tensor) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        if not any(ctx.needs_input_grad):
            for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True):
                total += _loss(head(h), t, denominator, wants_grad=False)
            return total
        grads = [torch.zeros_like(p, dtype=torch.float32) for p in params]
        hidden_grad = torch.empty_like(hidden)
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            with torch.enable_grad():
                h = hidden[part].detach().requires_grad_()
                logits = head(h)
            # Where a family's code needs its logits' values for their gradient, autograd refuses what was written over them.
            grad_of_logits = logits.detach()
            total += _loss(grad_of_logits, targets[part], denominator, wants_grad=True)
            first, *rest = torch.autograd.grad(logits, (h, *params), grad_of_logits, allow_unused=True)
            del logits, grad_of_logits
            hidden_grad[part] = first
            for grad, more in zip(grads, rest, strict=True):
                if more is not None:
                    grad += more
        ctx.save_for_backward(hidden_grad, *(g.to(p.dtype) for g, p in zip(grads, params, strict=True)))
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        hidden_grad, *grads = ctx.saved_tensors
        # ``grad`` is 1 in training; the product keeps the function right for any other.
        scaled = [g * grad.to(g.dtype) for g in grads]
        return hidden_grad * grad.to(hidden_grad.dtype), None, None, None, None, *scaled


def _loss(logits: Tensor, targets: Tensor, denominator: float, wants_grad: bool) -> Tensor:
    """Return the loss of ``logits`` [N, V] and, if ``wants_grad``, turn them into their gradient where they lie.

    float32, but for a few rows at a time: softmax less 1 at the target needs no second tensor of the logits' size.
    """
    total = logits.new_zeros((), dtype=torch.float32)
    rows = max(1, PART // logits.shape[1])
    for part, target in zip(logits.split(rows), targets.split(rows), strict=True):
        exact = part.to(torch.float32, copy=True)
        exact -= exact.amax(dim=1, keepdim=True)
        place = target.unsqueeze(1)
        right = exact.gather(1, place)
        sums = exact.exp_().sum(dim=1, keepdim=True)
        total += (sums.log() - right).sum()
        if wants_grad:
            exact /= sums
            exact.scatter_add_(1, place, exact.new_full(place.shape, -1.0))
            part.copy_(exact.div_(denominator))
    return total / denominator
