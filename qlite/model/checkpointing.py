"""Activation checkpointing: keep each block's input, and compute the block again when its gradient is due."""

from transformers import PreTrainedModel


def checkpoint_blocks(model: PreTrainedModel) -> None:
    """Switch per-block checkpointing on (Chen et al. 2016, arXiv:1604.06174); it acts in training mode only.

    Non-reentrant: inputs need no gradient of their own, and random numbers (dropout) are drawn again alike.
    """
    model.activation_checkpointing_enable({"use_reentrant": False})
