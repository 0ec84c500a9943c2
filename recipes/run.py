"""The folder of a run, and its record, from which a stopped run is resumed."""

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from eval.records import write_json
from recipes import batch_loss, data, ending, processes, report
from recipes.claims import claimed
from recipes.training_state import newest_checkpoint, remove_checkpoints, step_of

MASKS = "masks.safetensors"


def read_record(out: Path) -> dict:
    """Return the record of the last run in this folder; empty if there was none."""
    path = out / "run.json"
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it, or choose another --out") from error
    if not isinstance(record, dict) or not isinstance(record.get("arguments"), dict):
        raise ValueError(f"{path} is not the record of a run; delete it, or choose another --out")
    return record


def is_trained(record: dict, out: Path) -> bool:
    """Tell whether the run in this folder has taken its last step but not written all its files."""
    state = newest_checkpoint(out / "resume")
    return state is not None and "files" not in record and step_of(state) == record.get("steps")


def earlier_record(args: argparse.Namespace, out: Path) -> dict:
    """Return the record of the run that this one continues; empty if this one is new.

    Raises:
        ValueError: the run in the folder has other arguments, so that this one can neither continue it nor, if training
            is over there, replace it.
    """
    record = read_record(out)
    if not record or not (args.resume or is_trained(record, out)):
        return {}
    if "files" in record:
        raise ValueError(f"--resume, but the run in {args.out} is complete; choose another --out for a new one")
    now = {key: value for key, value in vars(args).items() if key != "resume"}
    if differing := sorted(key for key in now if record["arguments"].get(key) != now[key]):
        name = differing[0]
        flag = "--resume with " if args.resume else ""
        trained = "" if args.resume else f", is trained and lacks only its end; delete {out / 'resume'} to give it up"
        raise ValueError(
            f"{flag}--{name.replace('_', '-')} {now[name]}, but the run in {args.out} had "
            f"{record['arguments'].get(name)}{trained}; repeat its command, or choose another --out"
        )
    return record


@contextmanager
def only_run(out: Path) -> Iterator[None]:
    """Prepare the folder of a run, and keep other runs out of it while the context lasts.

    Another run would remove the states of this one and mix its files with those of this one.

    Raises:
        ValueError: another run is using the folder, or it cannot be written to.
    """
    if not processes.is_first():
        yield
        return
    ending.prepare_folder(out)
    with ExitStack() as stack:
        is_free = True
        with suppress(OSError):  # some network file systems lock no folders
            is_free = stack.enter_context(claimed(out))
        if not is_free:
            raise ValueError(f"another run is using {out}; wait until it has ended, or choose another --out")
        ending.remove_temporary(out)
        yield


class Run:
    """The folder of a run and its record, which goes to `run.json` after every stage.

    Attributes:
        args: the command line.
        out: the folder.
        record: the content of `run.json`.
        resumes: whether an earlier run in the folder is continued.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.out = args, Path(args.out)
        ending.check_packages(scoring=bool(args.score))
        earlier = earlier_record(args, self.out)
        self.resumes = args.resume or bool(earlier)
        if is_trained(earlier, self.out):
            print(f"training is over in {self.out}: only what comes after it is done again", flush=True)
        # All have read what an earlier run left before the first one removes it.
        processes.wait()
        if not self.resumes and processes.is_first():
            # A later --resume must not take an earlier run's state for this one's.
            remove_checkpoints(self.out / "resume")
            (self.out / MASKS).unlink(missing_ok=True)
        self.record = {"scores": {}, "held_out_loss": {}, "seconds": {}} | earlier
        self.record["arguments"] = {key: value for key, value in vars(args).items() if key != "resume"}
        self.record |= {"base": args.model, "seed": args.seed}
        self.record |= {"machine": report.machine(), "processes": processes.count()}

    @contextmanager
    def stage(self, name: str):
        """Time a stage and write the record when it ends."""
        print(f"== {name}", flush=True)
        begin = time.perf_counter()
        yield
        seconds = self.record["seconds"]
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - begin
        if processes.is_first():
            write_json(self.record, self.out / "run.json")

    def score(self, when: str, checkpoint: Path, data_folder: str | None) -> None:
        """Score before or after training, unless the record has it; only the first process does."""
        if when not in self.record["scores"] and processes.is_first():
            with self.stage(f"score {when}"):
                self.record["scores"][when] = run_scores(self.args, checkpoint, data_folder, when)

    def measure_loss(self, when: str, model, held_out: list[data.Sample], pad_id: int) -> None:
        """Measure the held-out loss before or after training, unless the record has it."""
        if when not in self.record["held_out_loss"]:
            with self.stage(f"held-out loss {when}"):
                loss = batch_loss.evaluate(model, held_out, batch_size=self.args.batch_size, pad_id=pad_id)
                self.record["held_out_loss"][when] = loss


def run_scores(args: argparse.Namespace, checkpoint: str | Path, data_folder: str | None, when: str) -> dict:
    """Score a checkpoint with lm-eval; return the scores by task, empty if no task was asked for.

    Each task's result is written to `scores_WHEN.json` when the task ends, so that an interrupted run keeps it.
    """
    if not args.score:
        return {}
    from eval.score import score

    result = score(
        str(checkpoint),
        args.score,
        data=args.score_data or data_folder,
        limit=args.score_limit,
        batch_size=args.score_batch_size,
        seed=args.seed,
        out=str(Path(args.out) / f"scores_{when}.json"),
    )
    return result["tasks"]
