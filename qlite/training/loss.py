"""Token-chunked cross entropy: the loss over a vocabulary of V without ever holding [tokens, V] for all tokens.

The head and the loss run on ``chunk`` tokens at a time, and each chunk's gradient is taken at once, so that only one
chunk's logits live at any time, in forward and backward alike, and the head is not run a second time. Tokens without
a label never reach the head.
"""

import torch
from torch import Tensor, nn

from qlite.model.elementwise import losses, losses_backward_
from qlite.offload import sent


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
                total += losses(head(h), t).sum()
            return total / denominator
        grads = [torch.zeros_like(p, dtype=torch.float32) for p in params]
        hidden_grad, divisor = torch.empty_like(hidden), total.new_full((), denominator)
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            with torch.enable_grad():
                # One row of a batch: ``logits`` is then no view, and their gradient is the one tensor that they are.
                h = hidden[part].unsqueeze(0).detach().requires_grad_()
                logits = head(h)
            # Where a family's code needs its logits' values for their gradient, autograd refuses what was written over them.
            grad_of_logits = logits.detach()
            total += losses_backward_(grad_of_logits[0], targets[part], divisor).sum()
            first, *rest = torch.autograd.grad(logits, (h, *params), grad_of_logits, allow_unused=True)
            del logits, grad_of_logits
            hidden_grad[part] = first[0]
            for grad, more in zip(grads, rest, strict=True):
                if more is not None:
                    grad += more
        ctx.save_for_backward(hidden_grad, *(g.to(p.dtype) for g, p in zip(grads, params, strict=True)))
        return total / denominator

    @staticmethod
    def backward(ctx, grad: Tensor):
        hidden_grad, *grads = ctx.saved_tensors
        # ``grad`` is 1 in training; the product keeps the function right for any other.
        scaled = [g * grad.to(g.dtype) for g in grads]
        return hidden_grad * grad.to(hidden_grad.dtype), None, None, None, None, *scaled
