"""Train an adapter: recipe -> base (quantised, frozen) -> method -> data -> steps -> adapter. Read this file first.

python -m qlite.train recipes/quickstart.toml
python -m qlite.train recipes/quickstart.toml train.steps=20 output.dir=runs/short
python -m qlite.train --keys
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

from qlite import device
from qlite.data.batches import TokenBatches
from qlite.errors import RecipeError
from qlite.methods.base import trainable_count
from qlite.model.checkpointing import checkpoint_blocks
from qlite.recipe.keys import print_keys
from qlite.recipe.read import read_recipe
from qlite.recipe.schema import Recipe
from qlite.training.console import open_console
from qlite.training.evaluate import compare_answers, evaluate
from qlite.training.report import Broadcast, Observer, StepReport
from qlite.training.run_folder import RunFolder
from qlite.training.step import Stepper
from qlite.training.summary import print_summary, summarise
from qlite.units import format_count
from qlite.verb import run_verb


def main(argv: list[str]) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m qlite.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", type=Path, help="a TOML file, for example recipes/quickstart.toml")
    parser.add_argument("overrides", nargs="*", help="table.key=value, put over the recipe")
    parser.add_argument("--fresh", action="store_true", help="delete the run of that folder first, instead of going on with it")
    parser.add_argument("--keys", action="store_true", help="print every key a recipe can have")
    args = parser.parse_intermixed_args(argv)
    if args.keys:
        print_keys()
        return
    if args.recipe is None:
        raise RecipeError("no recipe given; try: python -m qlite.train recipes/quickstart.toml")
    recipe = read_recipe(args.recipe, args.overrides).with_absolute_paths()
    run = RunFolder(Path(recipe.output.dir))
    if not args.fresh:
        run.check(recipe)
    if run.is_finished and not args.fresh:
        print(f"{run.path} is finished already. To train it anew: --fresh")
    else:
        with open_console(f"qlite  {args.recipe.stem}  {Path(recipe.base.model).name}") as console:
            train(recipe, run, console, args.fresh)
    print_summary(run)


def train(recipe: Recipe, run: RunFolder, console: Observer, fresh: bool = False) -> None:
    """Train what ``recipe`` says into ``run``, going on from its newest checkpoint if it has one and not ``fresh``.

    Raises:
        QliteError: the recipe, the data, the model's files or the machine do not allow it.
    """
    where = device.pick_device(recipe.parallel.device)
    threads = device.set_threads(recipe.parallel.threads)
    device.keep_freed_memory()
    meter = device.MemoryMeter(where)
    base = recipe.base.load(where, console.phase)
    notes: list[str] = []
    data = recipe.data.load(base.tokenizer, recipe.train.tokens, notes.append)
    device.seed_all(recipe.train.seed)
    recipe.method.attach(base.model)
    notes.append(f"{device.describe(where)}; {recipe.method.name}: {format_count(trainable_count(base.model))} trained parameters")
    if recipe.memory.checkpointing == "block":
        checkpoint_blocks(base.model)
    stepper = Stepper(base.model, recipe.method, recipe.memory.loss_chunk)
    groups = recipe.method.param_groups(base.model, recipe.optimizer.lr)
    optimizer = recipe.optimizer.build(groups, where, notes.append)
    plan = recipe.train
    batches = TokenBatches(data.train, plan.micro_batch, plan.accumulation, plan.seed, data.encoder.pad_id)
    steps = plan.steps or plan.epochs * batches.steps_per_epoch
    recipe.schedule.check(steps)

    # Only now is anything written or deleted: a mistyped path or target has shown itself by here.
    if fresh:
        run.discard()
    else:
        run.check(recipe)
    changed = run.begin(recipe, device.describe(where), threads)
    observer = Broadcast(console, run)
    state = run.resume(base.model, optimizer)
    for note in notes:
        observer.note(note)
    if state.step:
        observer.note(f"going on after step {state.step}")
        if changed:
            observer.note(f"since the run began the machine has changed, so its last bits may, too: {'; '.join(changed)}")
    elif plan.exact_match_rows:
        observer.answered(compare_answers(base.model, data, plan, 0, observer))

    for step in range(state.step + 1, steps + 1):
        started = time.perf_counter()
        device.seed_all(plan.seed, step)
        lr = optimizer.set_lr_factor(recipe.schedule.factor(step, steps))
        rows = batches.step(step)
        result = stepper.step(rows, optimizer, plan.clip_norm)
        recipe.method.after_step(base.model, optimizer, step)
        report = StepReport(
            step=step,
            steps=steps,
            epoch=step / batches.steps_per_epoch,
            loss=result.loss,
            lr=lr,
            grad_norm=result.grad_norm,
            tokens=sum(batch.tokens for batch in rows),
            trained_tokens=sum(batch.trained_tokens for batch in rows),
            seconds=time.perf_counter() - started,
            memory=meter.read(),
        )
        observer.step(report)
        state = replace(state, step=step, tokens=state.tokens + report.tokens)
        if data.test and is_due(plan.eval_every, step, steps):
            evaluation = evaluate(stepper, data, plan, step, observer)
            observer.evaluated(evaluation)
            state = replace(state, best_loss=min(evaluation.loss, state.best_loss or evaluation.loss))
        if is_due(recipe.output.save_every, step, steps):
            run.save(state, base.model, optimizer, recipe.output.keep)

    run.write_adapter(recipe, base.model)
    if plan.exact_match_rows:
        observer.answered(compare_answers(base.model, data, plan, steps, observer))
    run.finish(summarise(run.records(), meter.read(), data.system))


def is_due(every: int, step: int, steps: int) -> bool:
    """Return whether something done every so many steps, and always after the last, is due after ``step``."""
    return step == steps or (every > 0 and step % every == 0)


if __name__ == "__main__":
    run_verb(main, interrupted="interrupted; the same command goes on from the newest checkpoint, if one was written")
