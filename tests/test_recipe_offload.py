"""The GSM8K job with the base in host memory: everything it leaves is that of the job on a resident model."""

import pytest
import tiny_job
from conftest import equal_states
from quantized_models import SIZES
from safetensors.torch import load_file
from tiny_job import Killed, die_in_step, save_tiny

from recipes import batch_loss, command_line, fitting, gsm8k, memory, moving, presets, shapes, word_problems
from speft_optim.offload.training import OffloadedBase
from speft_optim.weights.attached import record_of, sparsified_roots

pytestmark = pytest.mark.usefixtures("quick_pictures")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints with the tiny tokenizer, and problems."""
    root = tmp_path_factory.mktemp("job")
    for kind, sizes in (("llama", {}), ("gemma2", {}), ("qwen2", SIZES)):
        # Gemma needs BOS, which tokenizers of transformers before 5 cannot be told to put.
        save_tiny(root / kind, kind, "<s> $A" if kind == "gemma2" else "$A", **sizes)
    word_problems.write(root / "problems", train=40, test=12)
    return root


def command(folders, kind, out, *more):
    fixed = ["--held-out", 8, "--accumulation", 2, "--steps", 5, "--lr", 3e-3, "--density", 0.05]
    return tiny_job.command(folders / kind, folders / "problems", out, *fixed, *more)


@pytest.fixture
def offloaded(monkeypatch):
    """Whether each model that was evaluated is offloaded, in order."""
    seen, real = [], batch_loss.evaluate

    def evaluate(model, *args, **options):
        hooks = [hook for root in sparsified_roots(model) for hook in record_of(root).hooks]
        seen.append(any(isinstance(hook, OffloadedBase) for hook in hooks))
        return real(model, *args, **options)

    monkeypatch.setattr(batch_loss, "evaluate", evaluate)
    return seen


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("llama", ["--interval", 2, "--window", 1]),
        ("gemma2", ["--no-moving", "--checkpointing", "--train-minutes", 10]),
        ("qwen2", ["--no-moving", "--base-bits", 4, "--state-bits", 8]),
        ("qwen2", ["--interval", 2, "--window", 1, "--base-bits", 8]),
    ],
)
def test_a_job_offloaded_equals_the_resident_one_bit_for_bit(kind, more, folders, tmp_path, offloaded):
    """The job of moving masks with one of the two blocks and the head on the device."""
    records = []
    stays = ["--resident-blocks", 1, "--resident-head"] if "--interval" in more else []
    for out, where in (("resident", []), ("host", ["--offload", *stays])):
        records.append(gsm8k.main(command(folders, kind, tmp_path / out, *more, *where)))
    assert offloaded[2:] == [True, True] and not any(offloaded[:2])
    for key in ("loss", "grad_norm", "tokens"):
        assert records[0]["history"][key] == records[1]["history"][key]
    before, after = ([record["held_out_loss"][when] for record in records] for when in ("before", "after"))
    # The resident model's is measured before its head is frozen, with whole logits.
    assert before[0] == pytest.approx(before[1], rel=1e-6) and after[0] == after[1]
    for key in ("mask", "moved", "lr", "steps", "adapter_sha256"):
        assert records[0][key] == records[1][key]
    assert records[1]["held_out_loss"]["after"] < records[1]["held_out_loss"]["before"]
    for file in ("checkpoint/model.safetensors", "adapter.safetensors", "masks.safetensors"):
        assert equal_states(*[load_file(tmp_path / out / file) for out in ("resident", "host")])


def test_an_offloaded_job_resumes_bit_equal(folders, tmp_path, monkeypatch):
    more = ["--no-moving", "--offload", "--checkpoint-every", 2]
    whole = gsm8k.main(command(folders, "llama", tmp_path / "whole", *more))
    with monkeypatch.context() as patch:
        die_in_step(patch, 4)
        with pytest.raises(Killed):
            gsm8k.main(command(folders, "llama", tmp_path / "killed", *more))
    resumed = gsm8k.main(command(folders, "llama", tmp_path / "killed", *more, "--resume"))
    assert resumed["history"]["loss"] == whole["history"]["loss"]
    assert resumed["held_out_loss"] == whole["held_out_loss"]
    assert resumed["adapter_sha256"] == whole["adapter_sha256"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--method", "full"], "leave it out of --method full"),
        (["--method", "lora", "--lr", "1e-3"], "leave it out of --method lora"),
        (["--compile"], "leave out --compile"),
        (["--resident-blocks", "-1"], "--resident-blocks is -1; it must be at least 0"),
        (["--no-offload", "--resident-head"], "--resident-blocks and --resident-head are for --offload"),
        (["--no-moving", "--salience", "synflow"], "--salience synflow needs the whole model on its device"),
    ],
)
def test_what_cannot_be_offloaded_is_refused_at_once(more, message, capsys):
    with pytest.raises(SystemExit):
        command_line.parse(["--model", "m", "--data", "d", "--offload", *more])
    assert message in capsys.readouterr().err


def test_more_resident_blocks_than_the_model_has_are_refused_before_anything_is_written(folders, tmp_path):
    more = ["--offload", "--resident-blocks", 999]
    with pytest.raises(ValueError, match="--resident-blocks is 999; the model has 2 blocks, so lower it"):
        gsm8k.main(command(folders, "llama", tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_the_dry_run_counts_offloaded_bytes_on_gpu_and_host(capsys):
    command = "--preset llama3-70b --base-bits 4 --offload --batch-size 2 --max-length 2048 --dry-run".split()
    moments, printed = gsm8k.main(command), capsys.readouterr().out
    shape = shapes.Shape.of(shapes.configuration("llama3-70b"))
    sizes = dict(bits=4, batch=2, length=2048)
    sums = moving.sum_bytes(sum(rows * columns for rows, columns in shape.targets()))
    counted = dict(entries=262_144_000, state_bits=8, accumulation=4, sums=sums, offload=True)
    assert moments == memory.estimate(shape, **sizes, **counted)
    host = memory.host_bytes(shape, **sizes)
    assert memory.describe(moments) in printed and f"host memory {host / memory.GIB:.2f} GiB" in printed
    resident = memory.peak_bytes(memory.estimate(shape, **sizes, **{**counted, "offload": False}))
    assert memory.peak_bytes(moments) < 0.25 * resident


@pytest.mark.parametrize(
    ("gb", "more", "bits", "offload", "reason"),
    [
        (24, [], 16, False, "no other mode is faster"),
        (16, [], 8, False, "the next faster mode, 16 bits on the GPU needs"),
        (12, [], 4, False, "the next faster mode, 8 bits on the GPU needs"),
        (6, [], 4, True, "the next faster mode, 4 bits on the GPU needs"),
        # Copies of 16-bit weights hide behind long batches.
        (16, ["--batch-size", 4, "--max-length", 2048], 16, True, "16 bits on the GPU needs"),
        # What was typed stays.
        (24, ["--base-bits", 4], 4, False, "no other mode is faster"),
        (8, ["--base-bits", 16], 16, True, "16 bits on the GPU needs"),
        (24, ["--offload"], 4, True, "no other mode is faster"),
    ],
)
def test_the_fastest_mode_that_fits_is_chosen_and_says_why(gb, more, bits, offload, reason, capsys):
    words = ["--preset", "llama3-8b", "--gpu-gb", gb, *more]
    args = command_line.parse([str(word) for word in words])
    sentence = capsys.readouterr().out
    assert (args.base_bits, args.offload) == (bits, offload) and reason in sentence
    needed = memory.peak_bytes(presets.expected_memory(args))
    assert needed <= memory.usable_bytes(gb)
    place = "in host memory" if offload else "on the GPU"
    assert sentence.startswith(f"{bits} bits {place} needs {needed / memory.GIB:.1f} GiB of the ")


@pytest.mark.parametrize("option", [["--compile"], ["--salience", "synflow", "--no-moving"], []])
def test_a_mode_that_other_options_refuse_is_not_chosen(option, monkeypatch):
    """Without these options 16 bits in host memory are chosen, which are faster than 8 or 4 on the GPU."""
    if not option:
        monkeypatch.setenv("WORLD_SIZE", "2")
    args = command_line.parse("--preset llama3-8b --batch-size 4 --max-length 2048 --gpu-gb 16".split() + option)
    assert args.base_bits < 16 and not args.offload


@pytest.mark.parametrize(
    ("gb", "more", "blocks", "head"),
    [
        (16, "--base-bits 16 --offload", None, True),
        (24, "--base-bits 4 --offload", 32, True),
        (16, "--base-bits 16 --offload --no-resident-head", None, False),
        (24, "--base-bits 8 --offload --resident-blocks 3", 3, True),
    ],
)
def test_as_many_blocks_as_fit_stay_on_the_gpu(gb, more, blocks, head, capsys):
    args = command_line.parse(f"--preset llama3-8b --gpu-gb {gb} {more}".split())
    sentence, limit = capsys.readouterr().out, memory.usable_bytes(gb)
    found = args.resident_blocks
    assert args.resident_head == head and (0 < found < 30 if blocks is None else found == blocks)
    assert f"with {found} of 32 blocks{' and the head' if head else ''} on the GPU" in sentence
    needed = memory.peak_bytes(presets.expected_memory(args))
    assert needed <= limit and f"needs {needed / memory.GIB:.1f} GiB" in sentence
    if blocks is None:
        args.resident_blocks += 1
        assert memory.peak_bytes(presets.expected_memory(args)) > limit
    args.resident_blocks = 33
    with pytest.raises(ValueError, match="--resident-blocks is 33; the model has 32 blocks"):
        presets.expected_memory(args)


def test_a_gpu_that_nothing_fits_and_methods_without_modes_are_refused(capsys):
    with pytest.raises(ValueError, match="nothing fits: 4 bits in host memory needs 8.* a GPU of 6 GB has"):
        command_line.parse("--preset llama3-70b --gpu-gb 6".split())
    with pytest.raises(SystemExit):
        command_line.parse("--preset demo --method full --gpu-gb 24".split())
    assert "--gpu-gb estimates sparse training in bfloat16" in capsys.readouterr().err


def test_every_mode_is_tried_whatever_the_tokens():
    few, many = fitting.by_speed(2048), fitting.by_speed(fitting.HIDING_TOKENS)
    assert set(few) == set(many) and len(few) == len(many) == 6
    assert few[0] == many[0] == fitting.Mode(16, offload=False) and many[1] == fitting.Mode(16, offload=True)
