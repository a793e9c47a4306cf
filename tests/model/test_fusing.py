"""One op for each elementwise piece: transformers' values and gradients, in fewer roundings, and only where its code is Llama's."""

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
import transformers.models
from torch import Tensor, nn
from transformers.models.llama import modeling_llama as llama

from qlite import compiling
from qlite.model import elementwise, fusing
from qlite.model.elementwise import rms_norm, rotary, swiglu
from qlite.model.fusing import fuse
from tests.families import FAMILIES, new_model
from tests.tiny import tiny_llama

CPU = torch.device("cpu")
# What of each family is Llama's: norms, MLPs, attentions with rotary positions.
FUSED = {
    "llama": {"norm", "mlp", "rotary"},
    "llama_biased": {"norm", "mlp", "rotary"},
    "mistral": {"norm", "mlp", "rotary"},
    "qwen2": {"norm", "mlp", "rotary"},
    "qwen3": {"norm", "mlp", "rotary"},
    "granite": {"norm", "mlp", "rotary"},
    "smollm3": {"norm", "mlp", "rotary"},
    "qwen3_5": {"mlp"},
    "gemma": {"rotary"},
    "opt": set(),
    "gpt_neox": set(),
}


def norm_of_llama(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    module = llama.LlamaRMSNorm(x.shape[-1], eps)
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module(x)


def rotary_of_llama(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return llama.apply_rotary_pos_emb(x, x, cos, sin)[0]


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape)


# Ours, transformers', and arguments: the first ``wants`` of them get a gradient.
PIECES = {
    "norm": (rms_norm, norm_of_llama, lambda: (drawn(2, 5, 48), drawn(48), 1e-5), 1),
    "one token's norm": (rms_norm, norm_of_llama, lambda: (drawn(1, 1, 48), drawn(48), 1e-5), 1),
    "swiglu": (swiglu, lambda gate, up: nn.functional.silu(gate) * up, lambda: (3 * drawn(2, 5, 48), drawn(2, 5, 48)), 2),
    "norm of a stretch": (rms_norm, norm_of_llama, lambda: (drawn(2, 5, 96)[..., 16:64], drawn(48), 1e-5), 1),
    "one token's swiglu": (swiglu, lambda gate, up: nn.functional.silu(gate) * up, lambda: (drawn(1, 1, 768), drawn(1, 1, 768)), 2),
    "rotary": (rotary, rotary_of_llama, lambda: (drawn(2, 5, 3, 16).transpose(1, 2), drawn(2, 5, 16), drawn(2, 5, 16)), 1),
    "one head's rotary": (rotary, rotary_of_llama, lambda: (drawn(1, 1, 1, 16).transpose(1, 2), drawn(1, 1, 16), drawn(1, 1, 16)), 1),
    "rotary of a stretch": (
        rotary,
        rotary_of_llama,
        lambda: (drawn(2, 5, 3, 32)[..., :16].transpose(1, 2), drawn(2, 5, 16), drawn(2, 5, 16)),
        1,
    ),
    "rotary, one table": (rotary, rotary_of_llama, lambda: (drawn(2, 5, 3, 16).transpose(1, 2), drawn(1, 5, 16), drawn(1, 5, 16)), 1),
}


def value_and_grads(piece: Callable, args: tuple, wants: int, dtype: torch.dtype) -> list[Tensor]:
    args = [arg.to(dtype) if isinstance(arg, Tensor) else arg for arg in args]
    for arg in args[:wants]:
        arg.requires_grad_()
    # Products, as a model has them: the gradient of SwiGLU takes its inputs' memory.
    y = piece(*(arg * 1 if index < wants else arg for index, arg in enumerate(args)))
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    return [t.double() for t in (y.detach(), *torch.autograd.grad(y, args[:wants], grad))]


@pytest.mark.parametrize("name", PIECES)
def test_a_piece_is_transformers_piece_and_rounds_less(name):
    ours, theirs, make, wants = PIECES[name]
    torch.manual_seed(0)
    args = make()
    # What is rounded for bfloat16 is the same for all.
    args = tuple(arg.to(torch.bfloat16).float() if isinstance(arg, Tensor) else arg for arg in args)
    exact = value_and_grads(theirs, args, wants, torch.float64 if name != "norm" else torch.float32)
    for found, right in zip(value_and_grads(ours, args, wants, torch.float32), exact, strict=True):
        torch.testing.assert_close(found, right, rtol=2e-5, atol=2e-5)
    rounded = [value_and_grads(piece, args, wants, torch.bfloat16) for piece in (ours, theirs)]
    for found, other, right in zip(*rounded, exact, strict=True):
        assert (found - right).norm() <= 1.02 * (other - right).norm()


def losses_and_grad(size: int, dtype: torch.dtype, rows: int = 5) -> list[Tensor]:
    """Return losses without a gradient and with one, and the gradient, of random logits of a vocabulary of ``size``."""
    chance = torch.Generator().manual_seed(size)
    logits, targets = 4 * torch.randn(rows, size, generator=chance).to(dtype), torch.randint(size, (rows,), generator=chance)
    kept = logits.clone()
    alone = elementwise.losses(logits, targets)
    assert torch.equal(logits, kept)
    return [alone, elementwise.losses_backward_(logits, targets, torch.tensor(7.0)), logits]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_torchs_and_its_gradient_takes_the_logits_place(dtype):
    chance = torch.Generator().manual_seed(300)
    logits, targets = 4 * torch.randn(5, 300, generator=chance).to(dtype), torch.randint(300, (5,), generator=chance)
    exact = logits.double().requires_grad_()
    right = nn.functional.cross_entropy(exact, targets, reduction="none")
    (grad,) = torch.autograd.grad(right.sum() / 7, exact)
    alone, with_grad, found = losses_and_grad(300, dtype)
    assert alone.dtype == with_grad.dtype == torch.float32
    torch.testing.assert_close(alone.double(), right.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(with_grad, alone, rtol=1e-6, atol=1e-6)
    bound = 1e-6 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(found.double(), grad, rtol=bound, atol=1e-7)


def test_the_loss_that_is_not_compiled_is_float32_a_few_rows_at_a_time(monkeypatch):
    whole = losses_and_grad(300, torch.bfloat16)
    monkeypatch.setattr(elementwise, "PART", 600)
    assert all(map(torch.equal, losses_and_grad(300, torch.bfloat16), whole))


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Iterator[Path]:
    """An empty cache for kernels."""
    folder = tmp_path_factory.mktemp("kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiling, "cache_folder", lambda: folder)
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
        yield folder


@contextmanager
def compiled_kernels() -> Iterator[None]:
    try:
        assert elementwise.compile_kernels(CPU, torch.float32) is None
        yield
    finally:
        elementwise.run_plainly()


def values_of_all_pieces() -> list[list[Tensor]]:
    torch.manual_seed(0)
    found = [value_and_grads(ours, make(), wants, torch.float32) for ours, _, make, wants in PIECES.values()]
    return [*found, losses_and_grad(50, torch.float32), losses_and_grad(5000, torch.float32), losses_and_grad(300, torch.float32, rows=1)]


def test_compiled_a_piece_is_the_same_in_any_shape_and_compiled_once_a_machine(kept, monkeypatch):
    plain = values_of_all_pieces()
    with compiled_kernels():
        first = values_of_all_pieces()
    torch.testing.assert_close(first, plain, rtol=2e-6, atol=2e-6)
    monkeypatch.setattr(compiling, "_make", lambda *_: pytest.fail("compiled anew"))
    with compiled_kernels():
        second = values_of_all_pieces()
    for ours, other in zip(second, first, strict=True):
        assert all(map(torch.equal, ours, other))


def test_a_damaged_kernel_is_made_anew(kept):
    with compiled_kernels():
        right = values_of_all_pieces()
    (path,) = (kept / "kernels").glob("*/_gated")
    path.write_bytes(path.read_bytes()[:1000])
    with compiled_kernels():
        assert all(map(torch.equal, values_of_all_pieces()[3], right[3]))
    assert path.stat().st_size > 1000


def test_a_kernel_that_computes_something_else_is_not_used(kept, monkeypatch):
    with compiled_kernels():
        pass
    real = compiling._returning
    monkeypatch.setattr(compiling, "_returning", lambda artifact: lambda *args: -real(artifact)(*args))
    assert elementwise.compile_kernels(CPU, torch.float32) == "the compiled _norm_rows computes something else than it should"
    assert not any(each.compiled for each in elementwise._KERNELS.values())
    monkeypatch.undo()
    with compiled_kernels():  # nothing wrong was kept
        pass


def test_a_compiled_kernel_is_not_given_what_it_was_not_compiled_for(kept):
    def broken(*_: object) -> None:
        pytest.fail("asked")

    with compiled_kernels():
        for kernel in elementwise._KERNELS.values():
            kernel.compiled[CPU, torch.float32] = broken
        x = torch.randn(2, 8).bfloat16()
        rms_norm(x, torch.ones(8).bfloat16(), 0.0)
        swiglu(x, x)
        assert rms_norm(torch.randn(2, 8), torch.ones(8).double(), 0.0).shape == (2, 8)


def test_logits_with_gaps_between_their_rows_or_none_have_their_loss_too(kept):
    chance = torch.Generator().manual_seed(5)
    wide, targets = torch.randn(4, 80, generator=chance), torch.tensor([3, 0, 49, 7])
    right = nn.functional.cross_entropy(wide[:, :50], targets, reduction="none")
    grad = (wide[:, :50].softmax(1) - nn.functional.one_hot(targets, 50)) / 7
    with compiled_kernels():
        cut = wide.clone()
        torch.testing.assert_close(elementwise.losses(cut[:, :50], targets), right)
        torch.testing.assert_close(elementwise.losses_backward_(cut[:, :50], targets, torch.tensor(7.0)), right)
        torch.testing.assert_close(cut[:, :50], grad)
        assert torch.equal(cut[:, 50:], wide[:, 50:])
        assert elementwise.losses(torch.empty(0, 50), targets[:0]).shape == (0,)


def test_a_kernel_that_cannot_be_kept_is_used_all_the_same(kept, tmp_path, monkeypatch):
    def nothing_to_save(*_: object, **__: object) -> None:
        raise RuntimeError("no artifact to save")

    from torch._inductor.standalone_compile import CacheCompiledArtifact

    monkeypatch.setattr(compiling, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(CacheCompiledArtifact, "save", nothing_to_save)
    with compiled_kernels():
        assert all(each.compiled for each in elementwise._KERNELS.values())
    assert not list(tmp_path.glob("kernels/*"))


def test_machine_code_is_kept_by_processor_and_only_where_it_can_be(tmp_path, monkeypatch):
    variable = compiling.FOLDER_OF_INDUCTOR
    for folder, is_taken in ((tmp_path / "cache", True), (tmp_path / "a space", False), (tmp_path / "file", False)):
        (tmp_path / "file").touch()
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.setattr(compiling, "cache_folder", lambda folder=folder: folder)
        compiling._keep_machine_code()
        assert (os.environ.get(variable, "").startswith(str(folder))) == is_taken
    monkeypatch.setattr(compiling, "cache_folder", lambda: tmp_path / "cache")
    compiling._keep_machine_code()
    mine = os.environ.pop(variable)
    monkeypatch.setattr(compiling.machine, "architecture", lambda _: "another")
    compiling._keep_machine_code()
    assert os.environ[variable] != mine


def test_tritons_machine_code_lies_in_the_cache_unless_it_cannot_or_shall_not(tmp_path, monkeypatch):
    variable = compiling.TRITON_FOLDER
    monkeypatch.setenv(variable, "elsewhere")
    compiling.keep_triton_code()
    assert os.environ[variable] == "elsewhere"
    (tmp_path / "file").touch()
    for folder, is_taken in ((tmp_path / "file", False), (tmp_path / "cache", True)):
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.setattr(compiling, "cache_folder", lambda folder=folder: folder)
        compiling.keep_triton_code()
        assert (os.environ.get(variable) == str(folder / "triton")) == is_taken


def test_without_a_compiler_the_pieces_run_as_they_stand(tmp_path, monkeypatch):
    def none(*_: object) -> None:
        raise RuntimeError("no C++ compiler\nand more")

    monkeypatch.setattr(compiling, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(compiling, "_compile", none)
    assert elementwise.compile_kernels(CPU, torch.float32) == "no C++ compiler"
    assert torch.equal(rms_norm(torch.ones(2, 8), torch.ones(8), 0.0), torch.ones(2, 8))


@pytest.mark.parametrize("name", FUSED)
def test_what_is_fused_of_a_family(name):
    model = new_model(FAMILIES[name])
    fuse(model)
    kinds = {fusing._norm: "norm", fusing._mlp: "mlp"}
    found = {kinds.get(m.forward.__func__, "rotary") for m in model.modules() if "forward" in vars(m)}
    assert found == FUSED[name]


@pytest.mark.slow
def test_more_than_a_hundred_families_have_each_of_llamas_pieces():
    kinds = {"norm": llama.LlamaRMSNorm.forward, "mlp": llama.LlamaMLP.forward}
    found: dict[str, set[str]] = {"norm": set(), "mlp": set(), "rotary": set()}
    for path in sorted(Path(transformers.models.__path__[0]).glob("*/modeling_*.py")):
        with suppress(ImportError):  # of packages that only that family needs
            module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
            own = [vars(each).get("forward") for each in vars(module).values() if isinstance(each, type)]
            for kind, forward in kinds.items():
                found[kind] |= {path.parent.name for each in own if fusing._same(each, forward)}
            if any(fusing._with_rotary(each) is not None for each in own if each is not None):
                found["rotary"].add(path.parent.name)
    print({kind: len(families) for kind, families in found.items()})
    assert all(len(families) > 100 for families in found.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_fused_family_answers_and_learns_the_same(name):
    tokens = torch.randint(3, 100, (2, 11), generator=torch.Generator().manual_seed(1))
    results = []
    for is_fused in (False, True):
        model = new_model(FAMILIES[name]).requires_grad_(False)
        model.get_input_embeddings().weight.requires_grad_()
        if is_fused:
            fuse(model)
        logits = model(input_ids=tokens).logits
        logits.float().pow(2).mean().backward()
        results.append((logits.detach(), model.get_input_embeddings().weight.grad))
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5 * plain.abs().max().item())


def test_code_that_differs_in_a_sign_is_left_alone():
    class Other(llama.LlamaMLP):
        def forward(self, x):
            down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))
            return down_proj

    class Renamed(llama.LlamaMLP):
        def forward(self, x):
            # Another name, another class, the same lines.
            down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
            return down_proj

    assert not fusing._same(Other.forward, llama.LlamaMLP.forward)
    assert fusing._same(Renamed.forward, llama.LlamaMLP.forward)


def test_another_activation_is_left_alone():
    model = tiny_llama(hidden_act="gelu")
    fuse(model)
    assert not [m for m in model.modules() if isinstance(m, llama.LlamaMLP) and "forward" in vars(m)]


def test_a_norm_that_is_trained_gets_its_gradient():
    model = tiny_llama()
    fuse(model)
    model.model.norm.weight.requires_grad_()
    model(input_ids=torch.arange(8).unsqueeze(0)).logits.sum().backward()
    assert model.model.norm.weight.grad.abs().sum() > 0


def test_the_memory_of_swiglu_is_used_once():
    gate, up = (torch.randn(4, 8).requires_grad_() for _ in range(2))
    y = swiglu(gate * 1, up * 1).sum()
    y.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
