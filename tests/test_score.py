"""eval: tasks and filters against made-up answers, BOS, stopping, whole runs on tiny models, and comparison."""

import json
import math
import re
from pathlib import Path

import lm_eval
import pytest
import torch
import yaml
from byte_tokenizer import skip_unless_told_to_put_bos
from conftest import tiny_model
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GemmaTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import eval.score as score_module
from eval import compare, records
from eval.checkpoints import ensure_one_bos, load_tokenizer
from eval.harness import TASK_FOLDER, load_tasks, run
from eval.model import CheckpointLM, StopEachRow, as_language_model, load_model
from eval.records import hash_files
from eval.score import score, table
from recipes import models as recipe_models
from speft_optim import SparseAdamW, save_adapter, select_masks, sparsify

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
CHARACTERS = ["▁", "\n", *(chr(code) for code in range(33, 127))]
VOCABULARY = {token: index for index, token in enumerate(SPECIAL + CHARACTERS + [" "])}


def character_tokenizer(adds_bos=False):
    """One token a character."""
    inner = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    if adds_bos:
        inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


def gemma_tokenizer(**options):
    """The Gemma class with one token a character; without `add_bos_token` it prepends none."""
    try:
        return GemmaTokenizer(vocab=dict(VOCABULARY), merges=[], **options)
    except TypeError as error:
        pytest.skip(f"GemmaTokenizer of this version of transformers needs a file: {error}")


def save_checkpoint(folder, kind="llama", tokenizer=None, dtype=torch.float32):
    """A tiny random model that can read the prompts here."""
    model = tiny_model(kind, dtype=dtype, vocab_size=len(VOCABULARY), max_position_embeddings=4096)
    model.generation_config.eos_token_id = 1
    model.save_pretrained(folder)
    (tokenizer or character_tokenizer()).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def data(tmp_path):
    """Six training problems and two test problems, whose answers are 18."""
    folder = tmp_path / "data"
    folder.mkdir()
    for split, numbers in (("train", (3, 5, 6, 8, 9, 10)), ("test", (4, 7))):
        rows = [
            {"question": f"{split} {a}+{18 - a}?", "answer": f"{a}+{18 - a}=<<{a}+{18 - a}=18>>18\n#### 18"}
            for a in numbers
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


class Stub(LM):
    """Gives one answer to every prompt and remembers the requests."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.requests = answer, []

    def generate_until(self, requests, disable_tqdm=False):
        self.requests += [request.args for request in requests]
        return [self.answer for _ in requests]

    def loglikelihood(self, requests, disable_tqdm=False):
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


# --- tasks and filters


@pytest.mark.parametrize("task", ["demo", "gsm8k_local"])
@pytest.mark.parametrize(
    "answer, strict, flexible",
    [
        (" The answer is 18.", 0, 1),
        (" #### 18", 1, 1),
        (" 4+14=<<4+14=18>>18\n#### 18", 1, 1),
        (" #### 1,8", 1, 1),
        (" #### 18 or rather 19", 1, 0),
        (" #### 19", 0, 0),
        ("", 0, 0),
    ],
)
def test_answers_are_found_by_the_strict_and_the_flexible_filter(task, answer, strict, flexible, data):
    result = run(Stub(answer), load_tasks([task], data=data))[task]
    entries = result["scores"]["exact_match"]
    assert entries["strict-match"]["value"] == strict
    assert entries["flexible-extract"]["value"] == flexible
    assert all(entry["n"] == 2 for entry in entries.values())
    assert entries["strict-match"]["each"] == [strict] * 2
    assert result["headline"] == {"metric": "exact_match", "filter": "strict-match"}


def test_gsm8k_local_is_lm_evals_gsm8k_but_for_the_data():
    class AnyTag(yaml.SafeLoader):
        """Reads `!function` tags as text."""

    AnyTag.add_constructor("!function", lambda loader, node: node.value)
    theirs = yaml.load((Path(lm_eval.__file__).parent / "tasks/gsm8k/gsm8k.yaml").read_text(), AnyTag)
    ours = yaml.load((TASK_FOLDER / "gsm8k_local.yaml").read_text(), AnyTag)
    for key in ("task", "tag", "dataset_path", "dataset_name"):
        theirs.pop(key)
    for key in ("task", "custom_dataset"):
        ours.pop(key)
    assert ours == theirs


def test_prompts_shots_and_stops_are_those_of_the_task(data):
    stub = Stub("")
    run(stub, load_tasks(["demo"], data=data))
    prompt, options = stub.requests[0]
    assert prompt == "Question: test 4+14?\nAnswer:"
    assert options["until"][:2] == ["\n\n", "Question:"] and options["max_gen_toks"] == 96

    stub = Stub("")
    run(stub, load_tasks(["gsm8k_local"], data=data, fewshot=2, max_gen_tokens=7))
    prompt, options = stub.requests[0]
    shots = prompt.split("\n\n")
    assert len(shots) == 3 and shots[-1] == "Question: test 4+14?\nAnswer:"
    assert all(shot.startswith("Question: train ") and shot.endswith("#### 18") for shot in shots[:2])
    assert options["max_gen_toks"] == 7 and options["until"] == ["Question:", "</s>", "<|im_end|>"]


def test_fewshot_overrides_a_task_that_says_zero(data):
    stub = Stub("")
    result = run(stub, load_tasks(["demo"], data=data, fewshot=1))
    assert stub.requests[0][0].count("Question:") == 2 and result["demo"]["fewshot"] == 1


def test_seed_draws_the_examples(data, tmp_path):
    with open(f"{data}/train.jsonl", "w") as file:
        for number in range(40):
            file.write(json.dumps({"question": f"train {number}?", "answer": f"#### {number}"}) + "\n")

    def prompts(seed):
        stub = Stub("")
        run(stub, load_tasks(["gsm8k_local"], data=data, seed=seed), seed=seed)
        return [arguments[0] for arguments in stub.requests]

    assert prompts(1) == prompts(1) != prompts(2)


def test_one_problem_has_no_standard_error(data):
    entry = run(Stub("18"), load_tasks(["demo"], data=data), limit=1)["demo"]["scores"]["exact_match"]["strict-match"]
    assert entry["n"] == 1 and entry["stderr"] is None


def test_tasks_of_one_run_see_the_same_problems(data):
    results = run(Stub("#### 18"), load_tasks(["demo", "gsm8k_local"], data=data))
    assert list(results) == ["demo", "gsm8k_local"]
    assert results["demo"]["problems_sha256"] == results["gsm8k_local"]["problems_sha256"]


# --- BOS


@pytest.mark.parametrize("kind", ["gemma", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("options", [{}, {"add_bos_token": False}, {"add_bos_token": True}])
def test_gemma_gets_one_bos_whatever_its_tokenizer_says(kind, options):
    tokenizer = gemma_tokenizer(**options)
    assert ensure_one_bos(tokenizer, kind)
    assert tokenizer("ab")["input_ids"].count(2) == 1 and tokenizer("ab")["input_ids"][0] == 2


def test_whether_a_prompt_begins_with_bos_is_the_tokenizers_to_say_but_for_gemma():
    assert not ensure_one_bos(character_tokenizer(), "llama")  # names a BOS, was trained without it
    assert ensure_one_bos(character_tokenizer(adds_bos=True), "llama")


def test_gemma_without_a_bos_token_is_refused():
    tokenizer = character_tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match="needs BOS"):
        ensure_one_bos(tokenizer, "gemma2")


@pytest.mark.parametrize("template", [None, "{{ bos_token }}{% for turn in messages %}{{ turn.content }}{% endfor %}"])
def test_every_prompt_starts_with_exactly_one_bos(template, data, tmp_path, monkeypatch):
    tokenizer = gemma_tokenizer()
    tokenizer.chat_template = template
    folder = save_checkpoint(tmp_path / "run", "gemma2", tokenizer)
    seen = []
    monkeypatch.setattr(CheckpointLM, "tok_batch_encode", _remember(CheckpointLM.tok_batch_encode, seen))
    record = score(folder, ["demo"], data=data, max_gen_tokens=2, chat_template=template is not None)
    assert record["prepends_bos"]
    for ids, mask in seen:
        for row, real in zip(ids, mask, strict=True):
            prompt = row[real.bool()].tolist()
            assert prompt[0] == 2 and prompt.count(2) == 1


class Asked:
    """A request of lm-eval."""

    def __init__(self, *arguments):
        self.args = arguments


@pytest.mark.parametrize("count", [0, 1, 2])
def test_every_kind_of_request_sends_one_bos_where_the_tokenizer_puts_any(count, tmp_path, monkeypatch):
    """Also in a batch whose first prompt is the only one with a BOS in its text, and where a prompt is too long."""
    if count > 1:
        skip_unless_told_to_put_bos()
    tokenizer = character_tokenizer()
    if count:
        template = " ".join(["<bos>"] * count + ["$A"])
        special = processors.TemplateProcessing(single=template, special_tokens=[("<bos>", 2)])
        tokenizer.backend_tokenizer.post_processor = special
    folder = save_checkpoint(tmp_path / "run", tokenizer=tokenizer)
    model = load_model(Path(folder), None, None, "cpu")
    language_model = as_language_model(model, load_tokenizer(folder), 2)
    wanted = min(count, 1)
    ids, mask = language_model.tok_batch_encode(["<bos>abc", "ab"])
    assert [row[real.bool()].tolist().count(2) for row, real in zip(ids, mask, strict=True)] == [1, wanted]
    ids, _ = language_model.tok_batch_encode(["abcdef", "abcdef"], left_truncate_len=3)
    kept = [2] * wanted + tokenizer("abcdef", add_special_tokens=False)["input_ids"][-3 + wanted :]
    assert ids.tolist() == [kept] * 2
    seen = []
    monkeypatch.setattr(CheckpointLM, "_model_call", _remember_inputs(CheckpointLM._model_call, seen))
    language_model.loglikelihood([Asked("ab", " c")])
    language_model.loglikelihood_rolling([Asked("abc")])
    # Whole texts are read from a BOS on in any case, where the tokenizer names one.
    assert [row.tolist().count(2) for rows in seen for row in rows] == [wanted, 1]


def test_scores_do_not_depend_on_the_path_of_a_checkpoint(data, tmp_path):
    one = save_checkpoint(tmp_path / "gemma-2-2b", "gemma2", gemma_tokenizer(add_bos_token=True))
    other = save_checkpoint(tmp_path / "out" / "run1", "gemma2", gemma_tokenizer())
    records = [score(folder, ["demo"], data=data, max_gen_tokens=8) for folder in (one, other)]
    assert records[0]["tasks"] == records[1]["tasks"]
    assert records[0]["checkpoint_sha256"] == records[1]["checkpoint_sha256"]
    assert _answers(one, data) == _answers(other, data)


# --- stopping


class Scripted(LlamaForCausalLM):
    """Writes a given text in each row and counts its forward passes."""

    def forward(self, input_ids=None, **options):
        result = super().forward(input_ids=input_ids, **options)
        for row, script in enumerate(self.scripts):
            result.logits[row, -1] = 0
            result.logits[row, -1, script[min(self.passes, len(script) - 1)]] = 1000.0
        self.passes += 1
        return result


def scripted(*texts):
    """A model and tokenizer that answer with these texts, and then with x for ever."""
    tokenizer = character_tokenizer()
    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = Scripted(LlamaConfig(vocab_size=len(VOCABULARY), pad_token_id=0, eos_token_id=1, **sizes)).eval()
    model.scripts = [tokenizer(text + "x")["input_ids"] for text in texts]
    model.passes = 0
    return model, tokenizer


def test_a_batch_ends_when_each_row_has_met_any_stop(data):
    texts = ["#### 18<eos>", "18\n\n"]  # one row by EOS, the other by a blank line
    model, tokenizer = scripted(*texts)
    tasks = load_tasks(["demo"], data=data)
    result = run(as_language_model(model, tokenizer, batch_size=2), tasks)
    assert model.passes == len("#### 18") + 1
    # Longest prompt first: which problem got which text is the harness's affair, and it sorts them back.
    assert sum(result["demo"]["scores"]["exact_match"]["strict-match"]["each"]) == 1
    assert sum(result["demo"]["scores"]["exact_match"]["flexible-extract"]["each"]) == 2


def test_the_limit_ends_what_never_stops(data):
    model, tokenizer = scripted("18", "#### 18")
    run(as_language_model(model, tokenizer, batch_size=2), load_tasks(["demo"], data=data, max_gen_tokens=20))
    assert model.passes == 20


def test_stop_criteria_see_generated_text_only():
    tokenizer = character_tokenizer()
    stops = StopEachRow(tokenizer, ["Question:", ""], prompt_length=9)
    rows = ["Question:Questio", "123456789Questio", "123456789uestion"]
    following = "n::"
    ids = torch.tensor([tokenizer(row)["input_ids"] for row in rows])
    assert stops(ids, None).tolist() == [False, False, False]
    for letter in following[:2]:
        ids = torch.cat([ids, torch.full((3, 1), VOCABULARY[letter])], dim=1)
    assert stops(ids, None).tolist() == [True, True, False]


# --- whole runs


def test_a_score_is_recorded_with_all_that_it_depends_on(data, tmp_path, capsys):
    folder = save_checkpoint(tmp_path / "run", dtype=torch.bfloat16)
    capsys.readouterr()
    out = tmp_path / "new" / "scores.json"
    record = score(folder, ["demo", "gsm8k_local"], data=data, limit=1, out=str(out), max_gen_tokens=5, batch_size=4)
    assert json.loads(out.read_text()) == record
    assert [path.name for path in out.parent.iterdir()] == ["scores.json"]
    assert record["checkpoint"] == folder and record["adapter"] is None and record["adapter_sha256"] is None
    assert record["checkpoint_sha256"] == hash_files([tmp_path / "run" / "model.safetensors"])
    assert record["limit"] == 1 and record["seed"] == 1234 and record["chat_template"] is False
    assert record["dtype"] == "float32" and record["seconds"] >= 0
    assert {name: task["fewshot"] for name, task in record["tasks"].items()} == {"demo": 0, "gsm8k_local": 5}
    assert set(record["versions"]) == {"python", "torch", "transformers", "lm_eval"}
    shown = table(record)
    assert "strict-match *" in shown and "flexible-extract" in shown
    streams = capsys.readouterr()
    assert "it/s" not in streams.err and "%|" not in streams.err  # no terminal, no bars


def test_an_interrupted_run_keeps_each_tasks_result_and_goes_on_with_the_others(data, tmp_path, monkeypatch):
    folder, out = save_checkpoint(tmp_path / "run"), tmp_path / "scores.json"
    options = dict(data=data, limit=2, max_gen_tokens=5)
    names = ["demo", "gsm8k_local"]
    whole = score(folder, names, **options, out=str(tmp_path / "whole.json"))
    real, ran = score_module.run, []

    def counted(model, loaded, **more):
        ran.append([*loaded["tasks"]])
        if len(ran) == 2:
            raise KeyboardInterrupt
        return real(model, loaded, **more)

    monkeypatch.setattr(score_module, "run", counted)
    with pytest.raises(KeyboardInterrupt):
        score(folder, names, **options, out=str(out))
    kept = json.loads(out.read_text())
    assert kept["tasks"] == {"demo": whole["tasks"]["demo"]} and kept["unfinished"] == ["gsm8k_local"]
    again = score(folder, names, **options, out=str(out))
    assert ran == [["demo"], ["gsm8k_local"], ["gsm8k_local"]]
    assert {**again, "seconds": 0} == {**whole, "seconds": 0} and json.loads(out.read_text()) == again
    # Nothing of a complete run is taken over, nor of one on other problems.
    problems = tmp_path / "data" / "test.jsonl"
    for found, text in ((again, problems.read_text()), (kept, problems.read_text() + "\n")):
        out.write_text(json.dumps(found))
        problems.write_text(text)
        ran[:] = [[]] * 3
        score(folder, names, **options, out=str(out))
        assert ran[3:] == [["demo"], ["gsm8k_local"]]


def test_a_result_file_that_cannot_be_written_is_refused_before_weights_are_read(data, tmp_path, monkeypatch):
    monkeypatch.setattr(score_module, "load_model", None)
    folder = save_checkpoint(tmp_path / "run")
    with pytest.raises(ValueError, match="cannot be written"):
        score(folder, ["demo"], data=data, out=str(tmp_path / "run" / "config.json" / "scores.json"))


def test_versions_of_packages_that_are_not_installed_are_none(monkeypatch):
    def missing(name):
        raise records.PackageNotFoundError(name)

    monkeypatch.setattr(records, "version", missing)
    assert records.package_version("lm_eval") is None


def test_two_runs_are_equal(data, tmp_path):
    folder = save_checkpoint(tmp_path / "run")
    first, second = (score(folder, ["demo"], data=data, max_gen_tokens=6, dtype="bfloat16") for _ in range(2))
    assert first["dtype"] == "bfloat16"
    assert {**first, "seconds": 0} == {**second, "seconds": 0}


def test_a_task_of_lm_evals_own_by_file_and_loglikelihood(data, tmp_path, monkeypatch):
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "pick.yaml").write_text(
        "task: pick\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {data}/test.jsonl}}, cache_dir: {tmp_path}/cache}}\n"
        'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{question}}"\n'
        'doc_to_choice: ["17", "18"]\ndoc_to_target: 1\nmetadata: {version: 1}\n'
    )
    monkeypatch.setattr("eval.harness.TASK_FOLDER", tasks)
    result = score(save_checkpoint(tmp_path / "run"), ["pick"])["tasks"]["pick"]
    assert set(result["scores"]) == {"acc", "acc_norm"}
    assert result["headline"] == {"metric": "acc", "filter": "none"}
    assert result["scores"]["acc"]["none"]["n"] == 2


def test_an_adapter_scores_like_its_checkpoint(data, tmp_path):
    base = save_checkpoint(tmp_path / "base", dtype=torch.bfloat16)
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    ids = torch.arange(10, 50).view(2, 20)
    batch = {"input_ids": ids, "labels": ids}
    masks = select_masks(model, [batch], salience="gradient", density=0.2)
    optimizer = SparseAdamW(sparsify(model, masks), lr=0.1)
    for _ in range(3):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "trained")
    character_tokenizer().save_pretrained(tmp_path / "trained")
    save_adapter(model, tmp_path / "adapter.safetensors")

    options = dict(data=data, max_gen_tokens=12)
    whole = score(str(tmp_path / "trained"), ["demo"], **options)
    overlaid = score(base, ["demo"], adapter=str(tmp_path / "adapter.safetensors"), **options)
    assert overlaid["adapter_sha256"] == hash_files([tmp_path / "adapter.safetensors"])
    assert overlaid["tasks"] == whole["tasks"]
    answers = _answers(base, data, adapter=tmp_path / "adapter.safetensors")
    assert answers == _answers(str(tmp_path / "trained"), data) != _answers(base, data)


# --- bad input


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tasks": []}, "at least one name"),
        ({"tasks": "demo"}, "give a list"),
        ({"tasks": ["demmo"]}, "did you mean demo"),
        ({"data": None}, "local folder"),
        ({"data": "nowhere"}, "no such data folder: nowhere"),
        ({"limit": 0}, "limit is 0"),
        ({"limit": 0.5}, "limit is 0.5"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_gen_tokens": -1}, "max_gen_tokens is -1"),
        ({"fewshot": -1}, "fewshot is -1"),
        ({"fewshot": 7}, "7 solved examples"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"limit": 10**30}, "limit is 10{30}; it must be .* at most"),
        ({"seed": -1}, "seed is -1; it must be a whole number from 0"),
        ({"seed": 2**32}, "seed is 4294967296; it must be a whole number from 0"),
        ({"dtype": "fp99"}, "dtype is 'fp99'"),
        ({"dtype": "float8_e4m3fn"}, "dtype is 'float8_e4m3fn'"),
        ({"device": "bogus"}, "device is 'bogus', which torch cannot use here .* use another, such as cpu"),
        ({"device": "cuda:999"}, "device is 'cuda:999', which torch cannot use here"),
        ({"device": "meta"}, "device is 'meta', which torch cannot use here"),
        ({"adapter": "nowhere.safetensors"}, "no such adapter file"),
        ({"chat_template": True}, "no chat template"),
        ({"out": "."}, "a folder"),
        ({"checkpoint": "/nowhere/at all"}, "no such checkpoint folder"),
        ({"checkpoint": "out/nothing"}, "nor could it be fetched"),
    ],
)
def test_bad_arguments_are_refused_before_weights_are_read(options, message, data, tmp_path, monkeypatch):
    monkeypatch.setattr(score_module, "load_model", None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments = {"checkpoint": save_checkpoint(tmp_path / "run"), "tasks": ["demo"], "data": data, **options}
    with pytest.raises(ValueError, match=message):
        score(arguments.pop("checkpoint"), arguments.pop("tasks"), **arguments)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no such file"),
        ("", "holds no problems"),
        ("{\n", "line 1: not JSON"),
        ('{"question": "a", "answer": "b"}\n{"question": "a"}\n', "line 2: needs"),
        ('{"question": "a", "answer": 3}\n', "line 1: needs"),
    ],
)
def test_bad_data_is_refused(content, message, data, tmp_path):
    (tmp_path / "data" / "test.jsonl").unlink()
    if content is not None:
        (tmp_path / "data" / "test.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_tasks(["demo"], data=data)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_an_incomplete_checkpoint_is_refused(name, data, tmp_path):
    folder = save_checkpoint(tmp_path / "run")
    (tmp_path / "run" / name).unlink()
    with pytest.raises(ValueError, match=r"lacks .*(config.json|safetensors)"):
        score(folder, ["demo"], data=data)


@pytest.mark.parametrize("kept", [0.5, 0, None])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_damaged_checkpoint_is_refused_by_the_name_of_its_file(name, kept, data, tmp_path, monkeypatch):
    """A file that is cut short, an empty one, and one of something else."""
    folder, path = save_checkpoint(tmp_path / "run"), tmp_path / "run" / name
    content = path.read_bytes()
    path.write_bytes(b"[1, 2, 3]" if kept is None else content[: int(kept * len(content))])
    monkeypatch.setattr(score_module, "load_model", None)
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} .*; copy or save the checkpoint again"):
        score(folder, ["demo"], data=data)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        recipe_models.resolve(folder)


def test_more_tokens_than_the_model_has_positions_are_refused(data, tmp_path):
    folder, out = save_checkpoint(tmp_path / "run"), tmp_path / "out.json"
    with pytest.raises(ValueError, match="max_gen_tokens is 4096; it must be below 4096"):
        score(folder, ["demo"], data=data, max_gen_tokens=4096, out=str(out))
    assert not out.exists()


def test_the_command_scores_and_asks_for_the_data(data, tmp_path, monkeypatch, capsys):
    folder = save_checkpoint(tmp_path / "run")
    out = str(tmp_path / "scores.json")
    words = [folder, "--tasks", "demo", "--data", data, "--limit", "1", "--max-gen-tokens", "3", "--out", out]
    monkeypatch.setattr("sys.argv", ["score", *words])
    score_module.main()
    assert "demo" in capsys.readouterr().out
    assert json.loads(open(out).read())["max_gen_tokens"] == 3
    monkeypatch.setattr("sys.argv", ["score", folder, "--tasks", "demo"])
    with pytest.raises(SystemExit, match="--data FOLDER"):
        score_module.main()


# --- comparison


def record_of(each, **options):
    """A score record of one filter, as `score` writes it."""
    value = sum(each) / len(each)
    stderr = math.sqrt(value * (1 - value) / (len(each) - 1))
    entry = {"value": value, "stderr": stderr, "n": len(each), "each": each}
    task = {"scores": {"exact_match": {"strict-match": entry}}, "fewshot": 0, "problems_sha256": "same"}
    return {"tasks": {"demo": {**task, **options.pop("task", {})}}, "seed": 0, **options}


def test_paired_difference_by_hand():
    first, second = [0, 0, 1, 1], [1, 0, 1, 1]
    rows = compare.rows({"a": record_of(first), "b": record_of(second)})
    assert rows[0]["difference"] is None
    assert rows[1]["difference"] == 0.25
    assert rows[1]["difference_stderr"] == pytest.approx(0.25)  # of 1, 0, 0, 0: sqrt(0.25 / 4)


def test_other_problems_are_independent():
    first, second = record_of([0, 0, 1, 1]), record_of([1, 0, 1, 1], task={"problems_sha256": "other"})
    _, row = compare.rows({"a": first, "b": second})
    assert row["difference_stderr"] == pytest.approx(math.sqrt(1 / 12 + 1 / 16))
    assert "problems_sha256 of demo" in compare.table({"a": first, "b": second})


def test_the_compare_command_prints_scores_differences_and_settings(tmp_path, capsys):
    paths = [tmp_path / f"{name}.json" for name in ("before", "after", "third")]
    for path, each in zip(paths, ([0, 0, 0, 1], [1, 0, 1, 1], [1, 1, 1, 1]), strict=True):
        path.write_text(json.dumps(record_of(each, seed=len(path.stem))))
    plot = tmp_path / "plots" / "scores.png"
    compare.main([*map(str, paths), "--plot", str(plot)])
    shown = capsys.readouterr().out
    assert "demo / exact_match / strict-match" in shown
    assert "25.00 +- 25.00" in shown and "+50.00 +- 28.87" in shown
    assert "seed: 6, 5, 5" in shown
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "names, message",
    [
        (["a.json"], "at least two"),
        (["a.json", "a.json"], "different"),
        (["a.json", "none.json"], "no such score file"),
        (["a.json", "text.json"], "not JSON"),
        (["a.json", "bytes.json"], "bytes.json is not JSON"),
        (["a.json", "list.json"], "no tasks"),
        (["a.json", "b.json"], "no score in common"),
    ],
)
def test_the_compare_command_refuses_records_that_cannot_be_compared(names, message, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(record_of([0, 1])))
    other = record_of([0, 1])
    other["tasks"] = {"elsewhere": other["tasks"]["demo"]}
    (tmp_path / "b.json").write_text(json.dumps(other))
    (tmp_path / "text.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "bytes.json").write_bytes(b"\xff")
    with pytest.raises(SystemExit, match=message):
        compare.main([str(tmp_path / name) for name in names])


# --- helpers


def _remember(function, seen):
    """Wraps `tok_batch_encode` and keeps what it returns."""

    def wrapped(*arguments, **options):
        seen.append(result := function(*arguments, **options))
        return result

    return wrapped


def _remember_inputs(function, seen):
    """Wraps `_model_call` and keeps the ids it is given."""

    def wrapped(self, ids, *arguments, **options):
        seen.append(ids.clone())
        return function(self, ids, *arguments, **options)

    return wrapped


def _answers(folder, data, adapter=None):
    """The raw text a checkpoint generates for each problem."""
    tokenizer = load_tokenizer(folder)
    model = load_model(Path(folder), adapter, None, "cpu")
    results = evaluate(as_language_model(model, tokenizer, 2), load_tasks(["demo"], data=data, max_gen_tokens=12))
    return [sample["resps"] for sample in results["samples"]["demo"]]
