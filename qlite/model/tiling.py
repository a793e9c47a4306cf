"""The MLP in tiles: a block's MLP sees some tokens at a time, so that only one tile's intermediates live, in any pass.

An MLP's intermediates are 3 to 4 times as wide as the hidden states, several at a time: for long lines they are most of what a
block takes. Its outputs for one token need no other token, so the tokens can go through it in turns (Bekman et al. 2025,
arXiv:2506.13996, section 3.1.2; blockwise feedforward: Liu and Abbeel 2023, arXiv:2305.19370, section 3).
"""

import inspect
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from qlite.device import RandomState
from qlite.errors import ModelError
from qlite.model.blocks import decoder_blocks
from qlite.quant.linear import is_linear


def tile_mlps(model: PreTrainedModel, tokens: int) -> None:
    """Let every block's MLP compute at most ``tokens`` tokens at a time; its gradient is taken tile by tile, computed again.

    Output and gradient are those of all tokens at once but for the order of sums (and the draws of dropout). Under
    ``checkpointing = "block"`` it costs no further pass: the block's recomputation stops before its last MLP if nothing after it is
    saved. Each tile makes the packed weights dense anew, so a tile should have many hundred tokens.

    Raises:
        ModelError: a block has no MLP of its own, which takes the hidden states alone.
    """
    found = {name: block_mlps(block) for name, block in decoder_blocks(model).items()}
    wrong = next((name for name, mlps in found.items() if len(mlps) != 1), None)
    if wrong is not None or not found:
        raise ModelError(
            f'memory.mlp_chunk = {tokens}: the family "{model.config.model_type}" has no module of its own for the MLP in {wrong}, '
            "so it cannot be computed in tiles; set memory.mlp_chunk = 0"
        )
    for (mlp,) in found.values():
        mlp.forward = _Tiles(mlp, tokens)


def block_mlps(block: nn.Module) -> list[nn.Module]:
    """Return the children of ``block`` that are MLPs by their structure: they hold linears and take one tensor.

    Attention, in whatever form, takes masks or positions, too; a linear, adapted or not, is a part and no MLP.
    """
    return [child for child in block.children() if _holds_linears(child) and _takes_one_tensor(child)]


def _holds_linears(module: nn.Module) -> bool:
    is_one_itself = is_linear(module) or is_linear(getattr(module, "frozen", None))
    return not is_one_itself and any(is_linear(inner) for inner in module.modules())


def _takes_one_tensor(module: nn.Module) -> bool:
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    return len(parameters) == 1 and parameters[0].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD


class _Tiles:
    """Stands as ``mlp.forward``: names and modules stay, so adapters are found, saved and merged as before."""

    def __init__(self, mlp: nn.Module, tokens: int):
        self.mlp, self.tokens, self.whole = mlp, tokens, mlp.forward

    def __call__(self, x: Tensor) -> Tensor:
        """Map x [..., D] to [..., D]."""
        if x.shape[:-1].numel() <= self.tokens:
            return self.whole(x)
        params = tuple(p for p in self.mlp.parameters() if p.requires_grad)
        if not torch.is_grad_enabled() or not any(t.requires_grad for t in (x, *params)):
            return self.outputs(x)
        # Saved before the MLP is computed: where nothing later is saved, a block's recomputation ends here (torch's early stop).
        return _TiledMLP.apply(x, self, [_SavedInput.apply(x, *params)], *params)

    def outputs(self, x: Tensor) -> Tensor:
        """Return the MLP of x [..., D], computed in tiles."""
        y = torch.empty_like(x, memory_format=torch.contiguous_format)  # and no view of it: Falcon adds to it in place
        rows, y_rows = (t.reshape(-1, x.shape[-1]) for t in (x, y))
        for part in self.parts(rows):
            y_rows[part] = self.of_part(rows[part])
        return y

    def of_part(self, rows: Tensor) -> Tensor:
        """Return the MLP of rows [N, D], which stand as one line: [N, D]."""
        y = self.whole(rows.unsqueeze(0))
        assert y.shape == (1, *rows.shape), "an MLP maps hidden states to hidden states"
        return y.squeeze(0)

    def parts(self, rows: Tensor) -> Iterator[slice]:
        """Yield the tiles of ``rows``."""
        return (slice(start, start + self.tokens) for start in range(0, len(rows), self.tokens))


class _SavedInput(torch.autograd.Function):
    """A node that keeps ``x``; nothing flows back through it. Its output is empty: before torch 2.13 a node keeps only while one lives."""

    @staticmethod
    def forward(ctx, x: Tensor, *_params: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.new_empty(0)


class _TiledMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, tiles: _Tiles, saved: list[Tensor], *params: Tensor) -> Tensor:
        # In a list, out of autograd's sight: no gradient is to flow to it.
        ctx.tiles, ctx.saved, ctx.params = tiles, saved, params
        ctx.random = RandomState(x.device)
        return tiles.outputs(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        saved = ctx.saved.pop()
        (x,) = saved.grad_fn.saved_tensors
        del saved
        rows, grad_rows = (t.reshape(-1, t.shape[-1]) for t in (x, grad))
        x_grad = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        # float32: the sum over tiles is rounded once.
        grads = [torch.zeros_like(p, dtype=torch.float32) for p in ctx.params]
        with ctx.random.again():
            for part in ctx.tiles.parts(rows):
                found = _tile_grads(ctx.tiles, rows[part], grad_rows[part], x_grad is not None, ctx.params)
                if x_grad is not None:
                    x_grad[part] = found.pop(0)
                for total, more in zip(grads, found, strict=True):
                    if more is not None:
                        total += more
        params_grads = (total.to(p.dtype) for total, p in zip(grads, ctx.params, strict=True))
        return None if x_grad is None else x_grad.view(x.shape), None, None, *params_grads


def _tile_grads(tiles: _Tiles, rows: Tensor, grad: Tensor, wants_rows: bool, params: tuple[Tensor, ...]) -> list[Tensor | None]:
    """Return the gradients of ``rows`` [N, D], if wanted, and of ``params``, given that of the tile's output."""
    with torch.enable_grad():
        rows = rows.detach().requires_grad_(wants_rows)
        y = tiles.of_part(rows)
    return list(torch.autograd.grad(y, (*([rows] if wants_rows else []), *params), grad, allow_unused=True))
