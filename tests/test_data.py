"""The generator, reading of data, tokenisation and batches."""

import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from byte_tokenizer import byte_tokenizer, skip_unless_told_to_put_bos
from tokenizers import processors
from transformers import AutoTokenizer, LlamaConfig

from eval.checkpoints import begins_with_bos, ensure_one_bos, load_tokenizer, prompt_ids
from recipes import data, packaged_models, word_problems

ROOT = Path(__file__).parent.parent
CALCULATION = re.compile(r"<<(\d+)([-+*/])(\d+)=(\d+)>>(\d+)")


def numbers_and_template(example):
    """What is left of a question without its names and things, so that equal sums look equal."""
    words = re.findall(r"\d+|[A-Za-z]+", example.question)
    return " ".join("_" if word in word_problems.NAMES or word in word_problems.THINGS else word for word in words)


# --- generator


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_calculation_is_right_and_the_last_one_is_the_answer(split):
    for example in word_problems.generate(1500, split=split):
        calculations = CALCULATION.findall(example.answer)
        assert 2 <= len(calculations) <= 3
        assert example.answer.count("<<") == len(calculations)
        for left, operator, right, result, repeated in calculations:
            exact = {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}
            expected = exact[operator] if operator != "/" else int(left) / int(right)
            assert expected == int(result) == int(repeated) > 0, example
        assert example.answer.splitlines()[-1] == f"#### {calculations[-1][3]}"


def test_every_number_that_is_used_stands_in_the_question_or_was_calculated():
    for example in word_problems.generate(1000, split="train", seed=5):
        known = set(re.findall(r"\d+", example.question)) | {"2"}  # "half" and "twice as many" stand for a 2
        for left, _, right, result, _ in CALCULATION.findall(example.answer):
            assert {left, right} <= known, example
            known.add(result)


def test_no_braces_are_left_and_names_differ():
    for example in word_problems.generate(1000, split="train"):
        assert not re.search(r"[{}]", example.question + example.answer)
        names = [word for word in re.findall(r"[A-Z][a-z]+", example.question) if word in word_problems.NAMES]
        assert len(set(names)) <= 2


def test_all_templates_occur_in_both_splits():
    for split in word_problems.SPLITS:
        beginnings = [
            re.escape(template.question.split("{thing}")[-1]).replace(r"\{name\}", r"\w+")
            for template in word_problems.TEMPLATES
        ]
        questions = [example.question for example in word_problems.generate(3000, split=split)]
        for beginning in beginnings:
            pattern = re.compile(re.sub(r"\\\{\w\\\}", r"\\d+", beginning).replace(r"\{other\}", r"\w+") + "$")
            assert any(pattern.search(question) for question in questions), beginning


def test_splits_share_no_sum_even_under_other_names_and_seeds():
    train = {numbers_and_template(e) for seed in (0, 1) for e in word_problems.generate(4000, split="train", seed=seed)}
    test = {numbers_and_template(e) for seed in (0, 2) for e in word_problems.generate(1000, split="test", seed=seed)}
    assert train and test and not train & test


def test_generation_is_the_same_every_time_and_in_every_process():
    first = word_problems.generate(50, split="train", seed=3)
    assert word_problems.generate(50, split="train", seed=3) == first
    assert word_problems.generate(20, split="train", seed=3) == first[:20]
    assert word_problems.generate(50, split="train", seed=4) != first
    assert len({example.question for example in first}) == 50
    program = "from recipes import word_problems; print(word_problems.generate(50, split='train', seed=3)[-1].question)"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == first[-1].question


@pytest.mark.parametrize(
    ("arguments", "message"), [(dict(count=0, split="train"), "count is 0"), (dict(count=1, split="dev"), "'dev'")]
)
def test_generator_refuses_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        word_problems.generate(**arguments)


def test_written_folder_reads_back_and_replaces_an_earlier_one(tmp_path):
    folder = tmp_path / "made" / "problems"
    word_problems.write(folder, train=30, test=10, seed=1)
    (folder / "stale").touch()
    assert word_problems.write(folder, train=40, test=12, seed=1) == folder
    assert sorted(path.name for path in folder.parent.iterdir()) == ["problems"]
    assert sorted(path.name for path in folder.iterdir()) == ["test.jsonl", "train.jsonl"]
    train, test = data.load_examples(str(folder))
    assert train == word_problems.generate(40, split="train", seed=1)
    assert test == word_problems.generate(12, split="test", seed=1)


def test_a_failed_write_leaves_the_earlier_folder(tmp_path):
    word_problems.write(tmp_path / "problems", train=5, test=5)
    with pytest.raises(ValueError, match="count is 0"):
        word_problems.write(tmp_path / "problems", train=7, test=0)
    assert len(data.read_jsonl(tmp_path / "problems" / "train.jsonl")) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["problems"]


# --- sources


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no problems"),
        ("{bad", "line 1 is not JSON"),
        ("[1]", "is a list"),
        ('{"question": "q"}', r"columns \['question'\]; rename"),
        ('{"question": 1, "answer": "a"}', "must both be text"),
    ],
)
def test_bad_lines_are_named(tmp_path, text, message):
    (tmp_path / "train.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        data.read_jsonl(tmp_path / "train.jsonl")


def test_folders_and_names_that_lead_nowhere_are_explained(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"lacks train.jsonl and test.jsonl"):
        data.load_examples(str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="neither a folder nor a data set"):
        data.load_examples(str(tmp_path / "missing"))
    with pytest.raises(ValueError, match="limit on training problems is 0"):
        data.load_examples(str(tmp_path), train_limit=0)


def test_metamath_columns_and_a_set_without_test_split(monkeypatch):
    import datasets

    rows = datasets.Dataset.from_dict({"query": [f"q{i}" for i in range(20)], "response": [f"a{i}" for i in range(20)]})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: datasets.DatasetDict(train=rows))
    train, held_out = data.load_examples("meta-math/MetaMathQA", train_limit=10, held_out=4)
    assert train == [data.Example(f"q{i}", f"a{i}") for i in range(10)]
    assert [example.question for example in held_out] == ["q10", "q11", "q12", "q13"]
    train, held_out = data.load_examples("meta-math/MetaMathQA", held_out=4)
    assert (len(train), held_out[0].question) == (16, "q16")
    with pytest.raises(ValueError, match="hold out fewer than 20"):
        data.load_examples("meta-math/MetaMathQA", held_out=20)


def test_gsm8k_of_the_hub_is_asked_for_with_its_configuration(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, config):
        asked.append((name, config))
        rows = datasets.Dataset.from_dict({"question": ["q", "r"], "answer": ["a", "b"]})
        return datasets.DatasetDict(train=rows, test=rows.select([1]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    train, test = data.load_examples("openai/gsm8k", train_limit=1)
    assert asked == [("openai/gsm8k", "main")]
    assert (train, test) == ([data.Example("q", "a")], [data.Example("r", "b")])


# --- tokens


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory):
    """By name: two real tokenizers, and tiny ones that do what real ones do about BOS, EOS and pad."""
    made = {
        "pad is eos": byte_tokenizer(pad="</s>"),
        "adds bos": byte_tokenizer(template="<s> $A"),
        "adds bos and eos": byte_tokenizer(template="<s> $A </s>"),
        "no pad": byte_tokenizer(pad=None),
    }
    cache = tmp_path_factory.mktemp("unpacked")
    for name in packaged_models.PACKAGED:
        try:
            made[name] = packaged_tokenizer(name, cache)
        except ValueError:
            continue  # the package is not installed, or transformers too old for it
    return made


def packaged_tokenizer(name, cache):
    """The tokenizer of a packaged model without unpacking its weights; of one unpacked before, what was saved then."""
    from transformers import AutoTokenizer

    model = packaged_models.PACKAGED[name]
    unpacked = ROOT / "models" / model.name.split("/")[-1]
    if (unpacked / "tokenizer.json").is_file():
        return AutoTokenizer.from_pretrained(unpacked)
    packaged_models.check_version()
    joined = cache / f"{name}.gguf"
    with joined.open("wb") as file:
        for piece in model.pieces:
            file.write(packaged_models._piece_path(model, *piece).read_bytes())
    return AutoTokenizer.from_pretrained(cache, gguf_file=joined.name)


KINDS = ["pad is eos", "adds bos", "adds bos and eos", "no pad", "smollm2", "gemma3-270m"]


@pytest.fixture(params=KINDS)
def tokenizer(request, tokenizers):
    if request.param not in tokenizers:
        pytest.skip(f"{request.param} is not installed, or transformers is too old for it")
    return tokenizers[request.param]


def test_one_bos_where_wanted_prompt_unlabelled_and_eos_trained(tokenizer):
    for example in word_problems.generate(20, split="train"):
        (sample,) = data.tokenize(tokenizer, [example], max_length=10_000)
        wants_bos = begins_with_bos(tokenizer)
        assert sample.input_ids.count(tokenizer.bos_token_id) == int(wants_bos)
        if wants_bos:
            assert sample.input_ids[0] == tokenizer.bos_token_id
        labelled = [label for label in sample.labels if label != data.IGNORED]
        start = len(sample.labels) - len(labelled)
        assert sample.labels[start:] == sample.input_ids[start:] == labelled
        assert labelled[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in sample.input_ids[:-1]
        assert tokenizer.decode(labelled[:-1]).strip() == example.answer.strip()
        # Generation starts from the prompt as the tokenizer itself encodes it.
        prompt = tokenizer(data.PROMPT.format(question=example.question))["input_ids"]
        if prompt[-1] == tokenizer.eos_token_id:
            prompt = prompt[:-1]
        assert sample.input_ids[:start] == prompt


def test_packaged_tokenizers_are_the_published_ones(tokenizers):
    gemma_digits = [236812, 236828, 236786, 236778, 236784, 236778, 236812]
    facts = {
        "smollm2": (49152, "<|im_start|>", "<|im_end|>", False, [216, 36, 40, 31, 34, 45, 34, 36]),
        "gemma3-270m": (
            262144,
            "<bos>",
            "<eos>",
            True,
            [236743, *gemma_digits],
        ),
    }
    for name in facts.keys() & tokenizers.keys():
        size, bos, eos, wants_bos, ids = facts[name]
        tokenizer = tokenizers[name]
        assert (len(tokenizer), tokenizer.bos_token, tokenizer.eos_token) == (size, bos, eos)
        assert begins_with_bos(tokenizer) is wants_bos
        assert tokenizer(" 48/2=24", add_special_tokens=False)["input_ids"] == ids
    if "smollm2" in tokenizers:
        assert "<|im_start|>" in tokenizers["smollm2"].chat_template


def test_a_token_across_the_boundary_is_not_trained_on():
    class Merging:
        """Glues ":" and the blank after it together, as no prompt alone ever would."""

        bos_token_id, eos_token_id = None, 9

        def __call__(self, texts, add_special_tokens=True):
            if isinstance(texts, str):
                return {"input_ids": [1]}
            table = {"Question: q\nAnswer:": [1, 2], "Question: q\nAnswer: 7": [1, 3, 7], " 7": [4, 7]}
            return {"input_ids": [table[text] for text in texts]}

    (sample,) = data.tokenize(Merging(), [data.Example("q", "7")], max_length=9)
    assert sample == data.Sample([1, 2, 4, 7, 9], [-100, -100, 4, 7, 9])


# --- One BOS, in training and in scoring ---


def stacked_processors():
    """A template with two BOS behind another processor, as Llama 3 has one."""
    tokenizer = byte_tokenizer(template="<s> <s> $A")
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.Sequence([processors.ByteLevel(), backend.post_processor])
    return tokenizer


BOS_COUNTS = {
    "none": (lambda: byte_tokenizer(), 0),
    "one": (lambda: byte_tokenizer(template="<s> $A"), 1),
    "one and eos": (lambda: byte_tokenizer(template="<s> $A </s>"), 1),
    "two": (lambda: byte_tokenizer(template="<s> <s> $A"), 2),
    "two and eos": (lambda: byte_tokenizer(template="<s> <s> $A </s>"), 2),
    "three": (lambda: byte_tokenizer(template="<s> <s> <s> $A"), 3),
    "two processors": (stacked_processors, 2),
}


@pytest.mark.parametrize("kind", BOS_COUNTS)
def test_a_tokenizer_that_puts_several_bos_is_set_to_one_with_a_warning_and_stays_so(kind, tmp_path, caplog):
    make, count = BOS_COUNTS[kind]
    if count > 1:
        skip_unless_told_to_put_bos()
    tokenizer = make()
    assert tokenizer("ab")["input_ids"].count(1) == count
    tokenizer.save_pretrained(tmp_path / "base")
    LlamaConfig().save_pretrained(tmp_path / "base")
    with caplog.at_level(logging.WARNING, "eval.checkpoints"):
        loaded = load_tokenizer(tmp_path / "base")
    assert [f"put {count} BOS" in record.getMessage() for record in caplog.records] == [True] * (count > 1)
    loaded.save_pretrained(tmp_path / "saved")
    for each in (loaded, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        ids = each("ab")["input_ids"]
        assert ids.count(1) == min(count, 1) and ids.index(68) == min(count, 1)
        assert ids.count(2) == tokenizer("ab")["input_ids"].count(2)  # whether it adds an EOS stays as it was
        assert each.decode(ids, skip_special_tokens=True) == "ab"


@pytest.mark.parametrize("kind", BOS_COUNTS)
def test_training_and_scoring_encode_a_prompt_alike(kind):
    make, count = BOS_COUNTS[kind]
    tokenizer = make()
    example = data.Example("1 and 1?", "2")
    prompt = data.PROMPT.format(question=example.question)
    (ids,) = prompt_ids(tokenizer, [prompt])
    (sample,) = data.tokenize(tokenizer, [example], max_length=100)
    assert sample.input_ids[: sample.labels.count(data.IGNORED)] == ids
    assert begins_with_bos(tokenizer) is (count > 0)
    assert ids.count(1) == min(count, 1) and ids.count(2) == 0
    # What a chat template has written already counts.
    assert prompt_ids(tokenizer, ["<s>" + prompt, "<s><s>" + prompt, prompt])[:2] == [[1, *ids[min(count, 1) :]]] * 2


def test_a_tokenizer_that_cannot_be_set_to_one_bos_is_refused():
    class Stubborn:
        """Puts two BOS whatever it is told."""

        bos_token_id, bos_token, eos_token_id = 1, "<s>", 2

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [1, 1, 5] if add_special_tokens else [5]}

    with pytest.raises(ValueError, match="exactly one, but its tokenizer .* puts 2 there"):
        ensure_one_bos(Stubborn(), "llama")


def test_long_problems_are_dropped_counted_and_never_cut(tokenizers):
    tokenizer = tokenizers["adds bos"]
    short, long = data.Example("a b", "c"), data.Example("a b", "c " * 50)
    with pytest.warns(UserWarning, match="dropped 1 of 2 problems that are longer than 30"):
        (kept,) = data.tokenize(tokenizer, [short, long], max_length=30)
    assert kept == data.tokenize(tokenizer, [short], max_length=30)[0]
    with pytest.raises(ValueError, match="max_length is 3, but the shortest of the problems has"):
        data.tokenize(tokenizer, [short, long], max_length=3)
    assert data.tokenize(tokenizer, [], max_length=3) == []


def test_a_tokenizer_without_eos_is_refused():
    with pytest.raises(ValueError, match="no EOS"):
        data.tokenize(byte_tokenizer(eos=None), [data.Example("a", "b")], max_length=9)


# --- batches


def test_padding_carries_no_label_and_real_eos_does_although_pad_is_eos(tokenizers):
    tokenizer = tokenizers["pad is eos"]
    examples = [data.Example("a", "b"), data.Example("a b c", "d e f")]
    samples = data.tokenize(tokenizer, examples, max_length=50)
    for side in ("right", "left"):
        batch = data.collate(samples, pad_id=tokenizer.pad_token_id, side=side)
        for row, sample in enumerate(samples):
            real = batch["attention_mask"][row].bool()
            assert batch["input_ids"][row][real].tolist() == sample.input_ids
            assert batch["labels"][row][real].tolist() == sample.labels
            assert batch["labels"][row][real][-1] == tokenizer.eos_token_id == tokenizer.pad_token_id
            assert (batch["labels"][row][~real] == data.IGNORED).all()
            assert (batch["input_ids"][row][~real] == tokenizer.pad_token_id).all()
        assert real.all() or batch["attention_mask"][0][-1 if side == "left" else 0] == 1
    with pytest.raises(ValueError, match="'middle'"):
        data.collate(samples, pad_id=0, side="middle")


def test_batches_for_calibration_hold_every_sample_once():
    samples = [data.Sample([i] * (1 + i % 7), [i] * (1 + i % 7)) for i in range(1, 24)]
    batches = data.make_batches(samples, 5, pad_id=0)
    assert sorted(int(row.max()) for batch in batches for row in batch["input_ids"]) == list(range(1, 24))
    assert all(isinstance(value, torch.Tensor) for batch in batches for value in batch.values())


def test_windows_shuffle_by_seed_cover_each_epoch_and_go_on_anywhere():
    samples = [data.Sample([i], [i]) for i in range(10)]

    def take(count, **options):
        windows = data.sample_windows(samples, 4, **options)
        return [[sample.input_ids[0] for sample in next(windows)] for _ in range(count)]

    whole = take(9, seed=1)
    assert [len(window) for window in whole] == [4, 4, 2] * 3
    for epoch in range(3):
        assert sorted(sum(whole[3 * epoch : 3 * epoch + 3], [])) == list(range(10))
    assert whole[:3] != whole[3:6] and whole != take(9, seed=2)
    for start in range(9):
        assert take(9 - start, seed=1, start=start) == whole[start:]


def test_read_jsonl_keeps_unicode_and_blank_lines_apart(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"question": "café ½", "answer": "1\n#### 1"}, ensure_ascii=False) + "\n\n", "utf-8")
    assert data.read_jsonl(path) == [data.Example("café ½", "1\n#### 1")]
