"""Where a family computes just what an op of ``elementwise`` does, let that op do it; all else stays transformers' code.

A family's code counts as the same if it is the same: transformers writes Llama's lines into most of its families, and compiled Python
can be compared. So a family that nobody here has heard of is fused where it may be, and one that differs in a sign is left alone.
"""

from collections.abc import Callable
from functools import cache, partial
from types import CodeType, FunctionType, MethodType

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.models.llama import modeling_llama as llama

from qlite.errors import ModelError
from qlite.model.blocks import decoder_blocks
from qlite.model.elementwise import remembering, rms_norm, rotary, swiglu

TURNING = "apply_rotary_pos_emb"


def fuse(model: PreTrainedModel) -> None:
    """Let the norms, gated MLPs and rotary positions of ``model`` run as one op each."""
    for module in model.modules():
        forward = type(module).forward
        if _same(forward, llama.LlamaRMSNorm.forward):
            module.forward = MethodType(_norm, module)
        elif _same(forward, llama.LlamaMLP.forward) and isinstance(module.act_fn, nn.SiLU | SiLUActivation):
            module.forward = MethodType(_mlp, module)
        elif (turning := _with_rotary(forward)) is not None:
            module.forward = MethodType(turning, module)


def make_again(model: PreTrainedModel) -> None:
    """Let what fused norms and gated MLPs give the linears behind them be made again for their gradient, not kept.

    LoRA's linears keep what they are given for A's gradient. It is made of what is kept anyway, by one pass over memory.

    Raises:
        ModelError: nothing in the model's blocks is fused, or no linear there keeps what it is given but by LoRA.
    """
    again = {_norm: _norm_again, _mlp: _mlp_again}
    again |= {forward: forward for forward in again.values()}  # views of a model share their norms
    modules = [module for block in decoder_blocks(model).values() for module in block.modules()]
    found = {module: again[own] for module in modules if (own := getattr(module.forward, "__func__", None)) in again}
    why = None if found else f'no norm or MLP of this "{model.config.model_type}" is fused'
    if not any(getattr(module, "knows_origins", False) for module in modules):
        why = "this method's linears keep what they are given otherwise than LoRA's"
    if why:
        raise ModelError(f'memory.checkpointing = "elementwise": {why}, so nothing is spared; set it to "none" or "block"')
    for module, forward in found.items():
        module.forward = MethodType(forward, module)


def turns_as_llama(attention: nn.Module) -> bool:
    """Return whether ``attention`` turns queries and keys by their positions with Llama's own function."""
    return _with_rotary(type(attention).forward) is not None


def _norm(self: nn.Module, hidden_states: Tensor) -> Tensor:
    if self.weight.requires_grad or self.weight.dtype != hidden_states.dtype:
        return type(self).forward(self, hidden_states)
    return rms_norm(hidden_states, self.weight, self.variance_epsilon)


def _norm_again(self: nn.Module, hidden_states: Tensor) -> Tensor:
    return remembering(_norm(self, hidden_states), partial(_norm, self), hidden_states)


def _mlp(self: nn.Module, x: Tensor) -> Tensor:
    return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


def _mlp_again(self: nn.Module, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return _mlp(self, x)  # which lets go of gate and up before the last product
    gate, up = self.gate_proj(x), self.up_proj(x)
    return self.down_proj(remembering(swiglu(gate, up), swiglu, gate, up))


def _rotary_of_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    if unsqueeze_dim != 1 or (torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad)):
        return llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)
    return rotary(q, cos, sin), rotary(k, cos, sin)


@cache
def _with_rotary(forward: Callable) -> FunctionType | None:
    """Return ``forward`` with ``rotary`` in place of the function of its own file that turns queries and keys, if that is Llama's."""
    if not isinstance(forward, FunctionType) or TURNING not in forward.__code__.co_names:
        return None
    own = forward.__globals__.get(TURNING)
    if not _same(own, llama.apply_rotary_pos_emb) or not _same(own.__globals__["rotate_half"], llama.rotate_half):
        return None
    names = {**forward.__globals__, TURNING: _rotary_of_both}
    copy = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


def _same(function: object, other: FunctionType) -> bool:
    """Return whether two functions are the same code, whatever they and their classes are called."""
    return isinstance(function, FunctionType) and _essence(function) == _essence(other)


def _essence(function: FunctionType) -> tuple:
    code: CodeType = function.__code__
    constants = tuple(constant for constant in code.co_consts if not isinstance(constant, str))
    return code.co_code, constants, code.co_names, code.co_varnames, function.__defaults__
