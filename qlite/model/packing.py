"""The guard before a packed run: does this model, as it was loaded, keep the documents of one line apart?

Whether it does depends on the family's code, on the attention it was given and on the kernels of the machine. A family that
does not would train without an error, on gradients that are wrong.
"""

import inspect

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlite.errors import ModelError
from qlite.model.head import hidden_states

# Tokens of the first and of the second document: more than a convolution's kernel, and not of one length.
FIRST, SECOND = 24, 40
# Mean over tokens of the relative difference of hidden states. The first is between two lines that differ only before the
# document: rounding is the same in both, and an attention that leaks in a single layer of SmolLM2's 30 gives 0.027 or more.
# The second is between a document in a line and alone, where rounding differs: 0.004 in bfloat16. A leak in all layers: 0.34.
MOST_FROM_OTHERS = 0.01
MOST_FROM_ALONE = 0.1
FIX = "set train.packing = false"


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> None:
    """Run documents packed and alone through ``model``, in eval mode and without gradients; its mode is as before afterwards.

    Raises:
        ModelError: a document sees what stands before it in its line, or is not what it is alone.
    """
    family = model.config.model_type
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        raise ModelError(f'train.packing: the family "{family}" takes no positions, so nothing keeps the documents of a line apart; {FIX}')
    was_training = model.training
    model.eval()
    try:
        from_others, from_alone = _differences(model)
    finally:
        model.train(was_training)
    # Not "more than": NaN is no proof.
    if not (from_others <= MOST_FROM_OTHERS and from_alone <= MOST_FROM_ALONE):
        raise ModelError(
            f'train.packing: the family "{family}" does not keep the documents of a line apart ({model.config._attn_implementation}): '
            f"a document's hidden states change by {from_others:.1%} with what stands before it "
            f"and are {from_alone:.1%} from those of the document alone; {FIX}"
        )


def _differences(model: PreTrainedModel) -> tuple[float, float]:
    """Return how far the second document of two lines differs between them, and how far both of a line's differ from alone."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().num_embeddings
    first, other, second = (torch.randint(vocabulary, (length,), generator=generator) for length in (FIRST, FIRST, SECOND))
    lines = torch.stack([torch.cat([first, second]), torch.cat([other, second])])
    positions = torch.cat([torch.arange(FIRST), torch.arange(SECOND)]).expand(2, -1)
    packed = hidden_states(model, lines.to(model.device), positions)
    # The second line's first document stands behind the first line where lines become one.
    alone = [hidden_states(model, document.unsqueeze(0).to(model.device))[0] for document in (other, second)]
    from_others = _relative(packed[1, FIRST:], packed[0, FIRST:])
    return from_others, _relative(packed[1], torch.cat(alone))


def _relative(states: Tensor, expected: Tensor) -> float:
    """Return the mean over tokens of |states - expected| / |expected|, [T, D] each."""
    states, expected = states.float(), expected.float()
    return ((states - expected).norm(dim=-1) / expected.norm(dim=-1)).mean().item()
