"""The table and the pictures of a comparison of methods, from cells written by hand."""

import json
import math

import pytest

from eval import entries, methods


def cell(method, rank, rate, seed, loss, **more):
    record = {"method": method, "budget_rank": rank, "rate": rate, "seed": seed, "test_loss": loss, "trained": 1000}
    record |= {"forgetting": {"own": 0.1, "documentation": -0.2}, "peak_bytes": 2_500_000_000, "workers": 1}
    return record | {"tokens_per_second": 1234.0, "density": None if rank is None else 0.0115} | more


CELLS = [
    *(cell("lora", 4, rate, 0, loss) for rate, loss in ((1e-3, 0.64), (3e-3, 0.61), (1e-2, 0.62))),
    cell("lora", 4, 3e-3, 1, 0.63),
    *(cell("static-snip", 4, rate, 0, loss) for rate, loss in ((3e-3, 0.62), (1e-2, 0.60), (3e-2, None))),
    cell("static-snip", 4, 1e-2, 1, 0.60),
    cell("dora", 4, 1e-3, 0, 0.7, workers=3, peak_bytes=None),
    cell("full", None, 1e-4, 0, 0.61),
]


def write(folder, cells):
    (folder / "cells").mkdir(parents=True)
    for number, record in enumerate(cells):
        (folder / "cells" / f"{number}.json").write_text(json.dumps(record))
    return folder


def rows_of(folder):
    found = [dict(zip(methods.HEADS, row, strict=True)) for row in methods.rows(entries.read_entries(folder))]
    return {row["method"]: row for row in found}


def test_table_by_hand(tmp_path):
    found = rows_of(write(tmp_path, CELLS))
    assert list(found) == ["static-snip", "lora", "dora", "full"]  # best first, all weights last
    snip, lora, dora, full = found.values()
    assert (snip["rate"], snip["loss"], snip["sd"], snip["n"], snip["bracketed"]) == (
        "0.01",
        "0.6000",
        "0.0000",
        "2",
        "yes",
    )
    assert (lora["rate"], lora["loss"], lora["sd"], lora["bracketed"]) == ("0.003", "0.6200", "0.0141", "yes")
    # 0.60 - 0.62, and sqrt(0 + 0.0141^2 / 2)
    assert snip["to best adapter"] == "-0.0200 +- 0.0100" and lora["to best adapter"] == ""
    assert dora["to best adapter"] == "+0.0800" and (dora["sd"], dora["n"], dora["bracketed"]) == ("", "1", "no")
    assert (dora["tokens/s"], lora["tokens/s"], dora["peak GB"], lora["peak GB"]) == ("1,234*", "1,234", "", "2.50")
    assert (lora["own texts"], lora["documentation"]) == ("+0.1000", "-0.2000")
    assert (full["share"], lora["share"], full["to best adapter"]) == ("all", "1.15%", "")


def test_a_rate_is_bracketed_by_worse_ones_on_both_sides_alone(tmp_path):
    def bracketed(*losses):
        cells = [entries.Entry("lora", 4, rate, (cell("lora", 4, rate, 0, x),)) for rate, x in enumerate(losses, 1)]
        return entries.best_of(cells)[1]

    assert bracketed(3, 1, 2) and bracketed(3, 1, None)
    assert not bracketed(1, 2, 3) and not bracketed(3, 2, 1) and not bracketed(1, 1, 3) and not bracketed(1)


def test_a_method_that_diverged_at_every_rate_is_named_so(tmp_path):
    found = rows_of(write(tmp_path, [cell("lora", 4, 1.0, 0, None), cell("pissa", 4, 1.0, 0, 0.9)]))
    assert found["lora"]["loss"] == "diverged" and found["lora"]["to best adapter"] == ""


def test_command_prints_text_or_markdown_and_draws(tmp_path, capsys):
    folder = write(tmp_path / "out", CELLS)
    methods.main([str(folder), "--plots", str(tmp_path / "pictures")])
    text = capsys.readouterr().out
    assert "static-snip" in text and "several workers shared the GPU" in text
    pictures = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert pictures == ["budgets.png", "forgetting.png", "memory.png", "rates.png"]
    assert all((tmp_path / "pictures" / name).stat().st_size > 10_000 for name in pictures)
    methods.main([str(folder), "--markdown"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| method |") and {line.count("|") for line in lines[:6]} == {len(methods.HEADS) + 1}


def test_no_picture_of_memory_without_a_gpu(tmp_path):
    folder = write(tmp_path, [cell("lora", 4, 1e-3, 0, 0.6, peak_bytes=None)])
    drawn = methods.draw(entries.read_entries(folder), tmp_path)
    assert [path.name for path in drawn] == ["rates.png", "forgetting.png", "budgets.png"]


def test_folders_without_cells_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="has no cells; train some"):
        methods.main([str(tmp_path)])
    folder = write(tmp_path / "out", [{"tasks": {}}])
    with pytest.raises(SystemExit, match="0.json is no cell of a comparison"):
        methods.main([str(folder)])


def test_differences_without_several_seeds_have_no_error():
    one, other = (entries.Entry("lora", 4, 1.0, (cell("lora", 4, 1.0, 0, loss),)) for loss in (0.5, 0.75))
    assert entries.difference(one, other) == (-0.25, None)
    assert math.isinf(entries.Entry("lora", 4, 1.0, (cell("lora", 4, 1.0, 0, None),)).mean)
