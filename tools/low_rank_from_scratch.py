"""What is learned from scratch when every weight is a product of two thin ones: Fashion-MNIST, a classifier 784-512-512-10.

    apt-get install dataset-fashion-mnist        # or any folder of the four idx files, plain or .gz
    pip install matplotlib
    python tools/low_rank_from_scratch.py --out build/low_rank

Three kinds of layer: "full", a whole weight W; "lora", B A alone with LoRA's first values, A drawn and B zero; "autoencoder", B A with
both drawn as two plain layers in a row. Each rank and seed is one training with Adam, same batches for all kinds; the rank of a layer is
never more than its smaller side, so the last one's is at most 10. Biases are trained in all. Finished trainings are kept in the folder:
a stopped study goes on, and another rank or seed only adds its own. It writes table.csv, and accuracy.png where matplotlib is there.
"""

import argparse
import gzip
import hashlib
import json
import struct
import time
import zlib
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev

import torch
from pictures import open_pyplot
from torch import Tensor, nn

from qlite.analysis.tables import as_csv
from qlite.errors import DataError, RecipeError, RunError
from qlite.files import make_folder, write_json, write_text
from qlite.methods.pure_low_rank import PureLowRankLinear
from qlite.verb import run_verb

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package puts the files."""
WIDTHS = (784, 512, 512, 10)
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
KINDS = {"lora": "LoRA's first values (B zero)", "autoencoder": "two plain layers in a row"}
FULL = "full"
MAGIC = {"images": 2051, "labels": 2049}
"""First number of an idx file. Source: yann.lecun.com/exdb/mnist, "file formats"."""


@dataclass(frozen=True)
class Settings:
    """What all trainings of a study have in common."""

    epochs: int
    batch: int
    lr: float
    rows: int
    """Of the training set."""
    data: str
    """What tells these pictures and classes from others."""


@dataclass(frozen=True)
class Training:
    """One training and the test accuracy after each epoch, 0 to 1."""

    kind: str
    rank: int
    """0: a whole weight."""
    seed: int
    parameters: int
    accuracy: list[float]


@dataclass(frozen=True)
class Pictures:
    """Images [N, 784] float32 and their classes [N]."""

    images: Tensor
    labels: Tensor


def main(argv: list[str]) -> None:
    """Train what the folder lacks, print the table, write it and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEBIAN, help=f"folder of the idx files; by default {DEBIAN}")
    parser.add_argument("--out", type=Path, default=Path("build/low_rank"))
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    least = {"seeds": args.seeds, "epochs": args.epochs, "batch": args.batch, "threads": args.threads}
    bad = [f"--{key} {value}: should be 1 or more" for key, value in least.items() if value < 1]
    bad += [f"--ranks {rank}: should be 1 to {WIDTHS[1]}" for rank in args.ranks if not 1 <= rank <= WIDTHS[1]]
    bad += [] if args.lr > 0 else [f"--lr {args.lr}: should be more than 0"]
    if bad:
        raise RecipeError(bad)
    torch.set_num_threads(args.threads)
    raw = read_raw(args.data)
    training, test = scaled(raw)
    settings = Settings(args.epochs, args.batch, args.lr, len(training.labels), digest(raw))
    each_seed = [(FULL, 0), *((kind, rank) for rank in dict.fromkeys(args.ranks) for kind in KINDS)]
    wanted = [(kind, rank, seed) for seed in range(args.seeds) for kind, rank in each_seed]
    found = study(args.out, settings, wanted, training, test)
    rows = table(found)
    print(as_markdown(rows))
    write_text(args.out / "table.csv", as_csv(rows))
    print(f"\n{args.out / 'table.csv'}")
    draw(found, args.out / "accuracy.png")


def read_raw(folder: Path) -> dict[str, list[Tensor]]:
    """Return images [N, 28, 28] and labels [N] of the training and the test set, uint8 as they lie in ``folder``.

    Raises:
        DataError: the folder has not the four idx files, or one is none; all of it at once.
    """
    problems: list[str] = []
    raw = {part: [_read_idx(folder, f"{part}-{what}", what, problems) for what in MAGIC] for part in ("train", "t10k")}
    for part, (images, labels) in raw.items():
        if images is not None and labels is not None and len(images) != len(labels):
            problems.append(f"{folder}: {part} has {len(images)} images and {len(labels)} labels")
    if problems:
        raise DataError("\n".join([*problems, f"install it with: apt-get install dataset-fashion-mnist (it goes to {DEBIAN})"]))
    return raw


def digest(raw: dict[str, list[Tensor]]) -> str:
    """Return what tells these images and labels from any others, packed or not."""
    whole = hashlib.sha256()
    for images, labels in raw.values():
        whole.update(f"{list(images.shape)}".encode())
        whole.update(images.numpy())
        whole.update(labels.numpy())
    return whole.hexdigest()[:16]


def scaled(raw: dict[str, list[Tensor]]) -> tuple[Pictures, Pictures]:
    """Return training and test pictures, both with the training set's mean taken off and divided by its deviation."""
    scale, center = raw["train"][0].float().std(), raw["train"][0].float().mean()
    made = [Pictures((images.float().flatten(1) - center) / scale, labels.long()) for images, labels in raw.values()]
    return made[0], made[1]


def _read_idx(folder: Path, name: str, what: str, problems: list[str]) -> Tensor | None:
    """Return the bytes of an idx file [N, ...]; where it is none, None, and ``problems`` has one more."""
    dimensions = MAGIC[what] - 2048
    found = [path for path in sorted(folder.glob(f"{name}*")) if path.suffix in ("", ".gz") or path.name.endswith("ubyte")]
    if not found:
        problems.append(f'"{folder}" has no {name}-idx{dimensions}-ubyte, plain or with .gz')
        return None
    path = found[0]
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        magic, *sizes = struct.unpack(f">{1 + dimensions}i", content[: 4 + 4 * dimensions])
    except struct.error:
        problems.append(f"{path}: is no idx file of {what}: it has {path.stat().st_size} bytes")
        return None
    except (OSError, EOFError, zlib.error) as error:
        problems.append(f"{path}: cannot be read: {error}")
        return None
    values = content[4 + 4 * dimensions :]
    if magic != MAGIC[what] or len(values) != torch.Size(sizes).numel() or (what == "images" and sizes[1] * sizes[2] != WIDTHS[0]):
        problems.append(f"{path}: is no idx file of {what}: it begins with {magic} {sizes} and has {len(values)} bytes of them")
        return None
    if what == "labels" and values and (largest := max(values)) >= WIDTHS[-1]:
        problems.append(f"{path}: has a label {largest}, and there are {WIDTHS[-1]} classes, 0 to {WIDTHS[-1] - 1}")
        return None
    return torch.frombuffer(bytearray(values), dtype=torch.uint8).view(sizes)


def study(out: Path, settings: Settings, wanted: list[tuple[str, int, int]], training: Pictures, test: Pictures) -> list[Training]:
    """Return the trainings ``wanted``, (kind, rank, seed) each: those that ``out`` has, and the others once they are made and kept there.

    Raises:
        RunError: what is in ``out`` was made with other settings.
    """
    make_folder(out)
    kept = out / "settings.json"
    if not kept.is_file():
        write_json(kept, asdict(settings))
    elif (before := json.loads(kept.read_text(encoding="utf-8"))) != asdict(settings):
        raise RunError(f"{out}: holds trainings with {before}, and these are {asdict(settings)}; choose another --out")
    found = []
    for number, (kind, rank, seed) in enumerate(wanted, start=1):
        path = out / "trainings" / f"{kind}-{rank}-{seed}.json"
        if path.is_file():
            found.append(Training(**json.loads(path.read_text(encoding="utf-8"))))
            continue
        began = time.perf_counter()
        found.append(train(kind, rank, seed, settings, training, test))
        make_folder(path.parent)
        write_json(path, asdict(found[-1]))
        told = f"{kind} {f'rank {rank} ' if rank else ''}seed {seed}: {found[-1].accuracy[-1]:.4f}"
        print(f"{number}/{len(wanted)}  {told}  {time.perf_counter() - began:.0f} s", flush=True)
    return found


def classifier(kind: str, rank: int) -> nn.Sequential:
    """Return the network with its first values from torch's generator; of low-rank layers only the two factors and the bias are trained."""
    layers: list[nn.Module] = []
    for into, out in pairwise(WIDTHS):
        whole = nn.Linear(into, out)
        whole.weight.requires_grad_(kind == FULL)
        layers += [whole if kind == FULL else PureLowRankLinear(whole, min(rank, into, out), kind), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def train(kind: str, rank: int, seed: int, settings: Settings, training: Pictures, test: Pictures) -> Training:
    """Return one training from ``seed``, which draws the first values and the order of rows."""
    torch.manual_seed(seed)
    model = classifier(kind, rank)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=settings.lr)
    order, accuracy = torch.Generator().manual_seed(seed), []
    for _ in range(settings.epochs):
        for rows in torch.randperm(len(training.labels), generator=order).split(settings.batch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(training.images[rows]), training.labels[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            accuracy.append(float((model(test.images).argmax(1) == test.labels).float().mean()))
    return Training(kind, rank, seed, sum(p.numel() for p in trained), accuracy)


def table(found: list[Training]) -> list[dict[str, str]]:
    """Return a row for each rank: parameters, the full network's over them, and the last accuracy of each kind in %, mean and deviation."""
    full = [each for each in found if each.kind == FULL]
    rows = []
    for rank in sorted({each.rank for each in found}):
        own = [each for each in found if each.rank == rank]
        row = {"rank": str(rank or FULL), "parameters": str(own[0].parameters)}
        row["full / these"] = f"{full[0].parameters / own[0].parameters:.2f}"
        row |= {kind: _cell([each.accuracy[-1] for each in own if each.kind in (kind, FULL)]) for kind in KINDS}
        rows.append(row)
    return rows


def _cell(accuracies: list[float]) -> str:
    spread = f" ± {100 * stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
    return f"{100 * mean(accuracies):.2f}{spread}"


def as_markdown(rows: list[dict[str, str]]) -> str:
    """Return the table for a README."""
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(found: list[Training], path: Path) -> None:
    """Write accuracy over epochs for each kind and rank, and the last one over the rank; the mean over seeds, its spread shaded.

    Raises:
        MachineError: there is no matplotlib.
    """
    pyplot = open_pyplot()
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.6), layout="constrained", sharey=True)
    ranks = sorted({each.rank for each in found} - {0})
    full = _curve(found, FULL, 0)
    for axis, (kind, words) in zip(axes, KINDS.items(), strict=False):
        for place, rank in enumerate(ranks):
            curve = _curve(found, kind, rank)
            colour = pyplot.colormaps["viridis"](0.9 * place / max(1, len(ranks) - 1))
            epochs = range(1, len(curve[0]) + 1)
            axis.plot(epochs, curve[0], "o-", ms=3, color=colour, label=f"rank {rank}")
            axis.fill_between(epochs, curve[1], curve[2], color=colour, alpha=0.15)
        axis.plot(range(1, len(full[0]) + 1), full[0], "k--", label="full rank")
        axis.set(title=words, xlabel="epoch", ylabel="test accuracy, %")
        axis.xaxis.get_major_locator().set_params(integer=True)
    # Beside the curves: within them it would hide one.
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(ranks) + 1, fontsize=8)
    for kind, words in KINDS.items():
        curves = [_curve(found, kind, rank) for rank in ranks]
        axes[2].plot(ranks, [curve[0][-1] for curve in curves], "o-", label=words)
        axes[2].fill_between(ranks, [curve[1][-1] for curve in curves], [curve[2][-1] for curve in curves], alpha=0.2)
    axes[2].axhline(full[0][-1], color="k", ls="--", label="full rank")
    axes[2].set(title="after the last epoch", xlabel="rank", xscale="log")
    axes[2].set_xticks(ranks, [str(rank) for rank in ranks], minor=False)
    axes[2].legend(fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    print(path)


def _curve(found: list[Training], kind: str, rank: int) -> tuple[list[float], list[float], list[float]]:
    """Return mean, lowest and highest accuracy in % after each epoch, over the seeds."""
    own = [each.accuracy for each in found if (each.kind, each.rank) == (kind, rank)]
    epochs = [[100 * value for value in values] for values in zip(*own, strict=True)]
    return [mean(values) for values in epochs], [min(values) for values in epochs], [max(values) for values in epochs]


if __name__ == "__main__":
    run_verb(main)
