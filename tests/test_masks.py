"""Masks: construction, both ways of holding positions, files, comparison, pictures; numpy is the brute-force oracle."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from speft_optim import Mask, Masks
from speft_optim.files import write_atomically
from speft_optim.masks.statistics import concentration, density_grid, split_name

examples = settings(max_examples=40, deadline=None, database=None)


def mask_of(*positions, shape=(4, 6)):
    return Mask(torch.tensor(positions, dtype=torch.int64), shape)


def is_packed(mask):
    return set(mask.packed()) == {"row_pointers", "columns"}


@st.composite
def positions_and_shape(draw, max_extent=9):
    shape = draw(st.lists(st.integers(1, max_extent), max_size=3))
    count = int(np.prod(shape, dtype=np.int64))
    return draw(st.lists(st.integers(0, count - 1), unique=True, max_size=count)), shape


@examples
@given(positions_and_shape())
def test_equals_a_boolean_array(case):
    positions, shape = case
    dense = np.zeros(shape, dtype=bool)
    dense.reshape(-1)[positions] = True
    mask = Mask(torch.tensor(positions, dtype=torch.int64), shape)
    assert mask.indices.dtype == torch.int32
    assert mask.indices.tolist() == np.flatnonzero(dense).tolist()
    assert len(mask) == dense.sum() and mask.density == dense.mean()
    as_rows = dense.reshape(-1, dense.shape[-1] if dense.ndim else 1)
    assert mask.row_counts().tolist() == as_rows.sum(1).tolist()
    assert mask.column_counts().tolist() == as_rows.sum(0).tolist()
    parts = mask.packed()
    assert mask.nbytes == sum(part.nbytes for part in parts.values())
    assert mask.nbytes <= 4 * len(mask)
    assert Mask.unpack(parts, shape) == mask


@examples
@given(positions_and_shape(), st.randoms())
def test_overlap_equals_set_arithmetic(case, random):
    positions, shape = case
    count = int(np.prod(shape, dtype=np.int64))
    others = random.sample(range(count), random.randint(0, count))
    mask, other = (Mask(torch.tensor(p, dtype=torch.int64), shape) for p in (positions, others))
    smaller = min(len(mask), len(other))
    expected = len(set(positions) & set(others)) / smaller if smaller else 1.0
    assert mask.overlap(other) == other.overlap(mask) == expected
    assert Masks(w=mask).overlap(Masks(w=other)) == expected
    assert (mask == other) == (set(positions) == set(others)) == (mask.fingerprint() == other.fingerprint())


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_sorts_positions_of_any_integer_dtype(dtype):
    given_positions = torch.tensor([23, 0, 7, 5], dtype=dtype)
    assert Mask(given_positions, (4, 6)).indices.tolist() == [0, 5, 7, 23]
    assert given_positions.tolist() == [23, 0, 7, 5]


def test_keeps_its_own_copy_of_the_positions():
    given_positions = torch.tensor([1, 2], dtype=torch.int32)
    mask = Mask(given_positions, (4, 6))
    given_positions.fill_(0)
    assert mask.indices.tolist() == [1, 2]


@pytest.mark.parametrize(
    "positions, shape, error, message",
    [
        (torch.tensor([1, 2, 1]), (4, 6), ValueError, "same position twice"),
        (torch.tensor([0, 24]), (4, 6), ValueError, r"position 24 lies outside 0\.\.23 .*\(4, 6\)"),
        (torch.tensor([-1, 3]), (4, 6), ValueError, "position -1 lies outside"),
        # The low 32 bits alone would be the valid position 5.
        (torch.tensor([2**32 + 5]), (4, 6), ValueError, "position 4294967301 lies outside"),
        (torch.tensor([0]), (0, 6), ValueError, "position 0 lies outside"),
        (torch.tensor([1]), (), ValueError, "position 1 lies outside"),
        (torch.tensor([], dtype=torch.int64), (-4, 6), ValueError, "not a shape"),
        (torch.tensor([], dtype=torch.int64), (2**40, 2**40), ValueError, "not a shape"),
        (torch.tensor([], dtype=torch.int64), (2.5,), ValueError, "not a shape"),
        (torch.tensor([1.0]), (4, 6), TypeError, "integer positions, got torch.float32"),
        (torch.tensor([True, False]), (2,), TypeError, r"nonzero\(\)"),
        (torch.tensor([[1, 2]]), (4, 6), TypeError, r"1-D tensor.*shape \(1, 2\)"),
        (torch.tensor(1), (4, 6), TypeError, "1-D tensor"),
        ([1, 2], (4, 6), TypeError, "1-D tensor.*a list"),
    ],
)
def test_refuses_what_is_no_set_of_positions(positions, shape, error, message):
    with pytest.raises(error, match=message):
        Mask(positions, shape)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3, 4), (3, 0), (0,), (5, 1)])
def test_full_and_empty_masks_of_odd_shapes_pack_and_count(shape):
    count = torch.Size(shape).numel()
    empty, full = mask_of(shape=shape), Mask(torch.arange(count), shape)
    assert len(empty) == 0 and empty.density == 0 and empty.indices.shape == (0,) and empty.nbytes == 0
    assert full.indices.tolist() == list(range(count))
    assert Mask.unpack(full.packed(), shape) == full and Mask.unpack(empty.packed(), shape) == empty
    assert int(full.row_counts().sum()) == int(full.column_counts().sum()) == count


@pytest.mark.parametrize(
    "shape, dtype",
    [
        ((2**31 - 1,), torch.int32),
        ((2**31,), torch.int64),
        ((2**16, 2**16), torch.int64),
        ((2**15, 2**16), torch.int64),
        ((2**15, 2**16 - 1), torch.int32),
    ],
)
def test_index_dtype_follows_from_the_shape_alone(shape, dtype):
    """Nothing of the weight's size is allocated: these would take gigabytes."""
    last = torch.Size(shape).numel() - 1
    mask = Mask(torch.tensor([last, 3, 0]), shape)
    assert mask.indices.dtype == dtype and mask.indices.tolist() == [0, 3, last]
    assert mask.nbytes == 3 * mask.indices.element_size()
    assert Mask.unpack(mask.packed(), shape) == mask


@pytest.mark.parametrize("columns, packs", [(1000, True), (2**16, True), (2**16 + 1, False)])
def test_holds_sixteen_bit_columns_where_they_fit_and_pay(columns, packs):
    generator = torch.Generator().manual_seed(0)
    positions = torch.randperm(4 * columns, generator=generator)[:400].sort().values
    positions[-1] = 4 * columns - 1
    mask = Mask(positions, (4, columns))
    assert is_packed(mask) == packs
    assert mask.nbytes == (2 * 400 + 4 * 5 if packs else 4 * 400)
    assert mask.indices.dtype == torch.int32 and torch.equal(mask.indices.long(), positions)
    flat = Mask.unpack({"indices": positions}, (4, columns))
    assert flat == mask and flat.fingerprint() == mask.fingerprint()


def test_packs_wide_weights_of_more_than_2_31_entries():
    """With int64 positions packing pays from six bytes an entry on; the round trip must pass the int32 range."""
    shape = (2**16, 2**16)
    positions = torch.arange(0, 2**32, 2**16 - 3, dtype=torch.int64)
    mask = Mask(positions, shape)
    assert is_packed(mask) and mask.nbytes == 2 * len(positions) + 4 * (2**16 + 1)
    assert mask.indices.dtype == torch.int64 and torch.equal(mask.indices, positions)


def test_rows_longer_than_sixteen_bits_count():
    """All of 2^16 columns of a row: pointers are of 32 bits."""
    positions = torch.arange(2**16, 3 * 2**16)
    mask = Mask(positions, (4, 2**16))
    assert mask.positions.row_pointers.tolist() == [0, 0, 2**16, 2**17, 2**17]
    assert torch.equal(mask.indices.long(), positions)
    assert Mask.unpack(mask.packed(), mask.shape) == mask and pickle.loads(pickle.dumps(mask)) == mask


@pytest.mark.parametrize(
    "change",
    [
        dict(row_pointers=torch.tensor([0, 2, 1, 4], dtype=torch.int32)),
        dict(row_pointers=torch.tensor([1, 2, 3, 4], dtype=torch.int32)),
        dict(row_pointers=torch.tensor([0, 2, 3, 5], dtype=torch.int32)),
        dict(row_pointers=torch.tensor([0, 2, 3], dtype=torch.int32)),
        dict(row_pointers=torch.tensor([0, -2, 3, 4], dtype=torch.int32)),
        dict(row_pointers=torch.tensor([0, 2**31 - 1, 3, 4], dtype=torch.int32)),
        dict(row_pointers=torch.tensor([[0, 2, 3, 4]], dtype=torch.int32)),
        dict(row_pointers=torch.tensor(4, dtype=torch.int32)),
        dict(row_pointers=torch.tensor([], dtype=torch.int32)),
        dict(row_pointers=torch.tensor([0, 2, 3, 4])),
        dict(row_pointers=torch.tensor([0.0, 2.0, 3.0, 4.0])),
        dict(columns=torch.tensor([0, 6, 2, 3]).to(torch.uint16)),
        dict(columns=torch.tensor([1, 1, 2, 3]).to(torch.uint16)),
        dict(columns=torch.tensor([0, 1, -1, 3], dtype=torch.int16)),
        dict(columns=torch.tensor([[0, 1], [2, 3]]).to(torch.uint16)),
        dict(columns=torch.tensor([0.0, 1.0, 2.0, 3.0])),
        dict(shape=(4, 6)),
        dict(shape=(3, 0)),
        dict(shape=()),
        dict(shape=(-3, -6)),
        dict(shape=("a", "b")),
        dict(shape=(2**62, 6)),
    ],
)
def test_unpack_refuses_hostile_parts(change):
    good = dict(
        row_pointers=torch.tensor([0, 2, 3, 4], dtype=torch.int32),
        columns=torch.tensor([0, 5, 2, 3]).to(torch.uint16),
        shape=(3, 6),
    )
    parts = {**good, **change}
    shape = parts.pop("shape")
    assert Mask.unpack({key: good[key] for key in parts}, good["shape"]).indices.tolist() == [0, 5, 8, 15]
    with pytest.raises(ValueError, match="shape"):
        Mask.unpack(parts, shape)


def test_unpack_names_a_missing_part():
    with pytest.raises(KeyError, match="columns"):
        Mask.unpack({"row_pointers": torch.tensor([0, 1], dtype=torch.int32)}, (1, 3))


def test_copies_and_pickles_equal_and_apart():
    for mask in (mask_of(1, 5, 9), Mask(torch.arange(0, 4000, 3), (4, 1000))):
        for twin in (copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
            assert twin == mask and is_packed(twin) == is_packed(mask)
            assert all(twin.packed()[key].data_ptr() != part.data_ptr() for key, part in mask.packed().items())
    assert mask.to("cpu") is mask


def test_compares_only_with_masks_of_its_shape():
    assert mask_of(1) != mask_of(2) and mask_of(1) != mask_of(1, shape=(6, 4)) and mask_of(1) != "mask"
    assert mask_of(1).fingerprint() != mask_of(1, shape=(6, 4)).fingerprint()
    with pytest.raises(TypeError, match="unhashable"):
        hash(mask_of(1))
    with pytest.raises(ValueError, match=r"\(4, 6\) and \(6, 4\)"):
        mask_of(1).overlap(mask_of(1, shape=(6, 4)))
    with pytest.raises(ValueError, match=r"masks of w: shapes \(4, 6\) and \(6, 4\) differ"):
        Masks(w=mask_of(1)).overlap(Masks(w=mask_of(1, shape=(6, 4))))


def test_fingerprint_of_a_selection_covers_names_and_positions_not_order():
    masks = Masks(a=mask_of(1), b=mask_of(2))
    assert masks.fingerprint() == Masks(b=mask_of(2), a=mask_of(1)).fingerprint()
    prints = {
        m.fingerprint()
        for m in (masks, Masks(a=mask_of(2), b=mask_of(1)), Masks(a=mask_of(1)), Masks(a=mask_of(1), c=mask_of(2)))
    }
    assert len(prints) == 4


def test_overlap_counts_weights_that_only_one_side_has():
    assert Masks(a=mask_of(1, 2), b=mask_of(3, 4)).overlap(Masks(a=mask_of(2), c=mask_of(5, 6, 7))) == 0.25


@pytest.fixture
def masks():
    return Masks(
        {
            "model.layers.1.mlp.up_proj.weight": Mask(torch.arange(0, 4000, 3), (4, 1000)),
            "model.layers.0.mlp.up_proj.weight": mask_of(1, 5),
            "model.layers.0.self_attn.q_proj.weight": mask_of(shape=(3, 5)),
            "model.norm.weight": mask_of(2, shape=(4,)),
            "scale": mask_of(0, shape=()),
            "wide": Mask(torch.tensor([2**31 + 7]), (2**16, 2**16)),
        }
    )


def test_file_gives_back_the_same_masks_in_the_same_order(masks, tmp_path):
    masks.save(tmp_path / "masks.safetensors")
    loaded = Masks.load(str(tmp_path / "masks.safetensors"))
    assert isinstance(loaded, Masks) and list(loaded) == list(masks) and loaded == masks
    assert loaded.fingerprint() == masks.fingerprint()


def test_a_file_takes_no_more_bytes_than_the_masks_do(tmp_path):
    mask = Mask(torch.arange(0, 512 * 512, 50), (512, 512))
    Masks(w=mask).save(tmp_path / "masks.safetensors")
    assert (tmp_path / "masks.safetensors").stat().st_size < mask.nbytes + 500 < 2.5 * len(mask) + 500


def test_one_mask_can_serve_several_weights(tmp_path):
    mask = mask_of(1, 2)
    masks = Masks(a=mask, b=mask)
    masks.save(tmp_path / "masks.safetensors")
    assert Masks.load(tmp_path / "masks.safetensors") == masks


def test_empty_selection_has_a_file_too(tmp_path):
    Masks().save(tmp_path / "none.safetensors")
    assert Masks.load(tmp_path / "none.safetensors") == {}
    assert Masks().summary() == "no masks" and Masks().density == 0


def hostile(metadata=None, **tensors):
    good = {"format": "speft_optim.masks/3", "shapes": json.dumps({"w": [4, 6]})}
    tensors = tensors or {"indices": torch.tensor([1, 2], dtype=torch.int32)}
    return lambda path: save_file(
        {f"w:{part}": tensor for part, tensor in tensors.items()}, path, {**good, **(metadata or {})}
    )


@pytest.mark.parametrize(
    "write",
    [
        lambda path: save_file({"w": torch.zeros(2)}, path),
        hostile({"format": "speft_optim.adapter/2"}),
        hostile({"shapes": "no json"}),
        hostile({"shapes": "[1, 2]"}),
        hostile({"shapes": '{"w": "abc"}'}),
        hostile({"shapes": '{"w": 4}'}),
        hostile({"shapes": '{"w": null}'}),
        hostile({"shapes": '{"w": [-4, -6]}'}),
        hostile({"shapes": '{"w": [4, 1e300]}'}),
        hostile({"shapes": '{"w": [2, 1]}'}),
        hostile({"shapes": '{"other": [4, 6]}'}),
        hostile(indices=torch.tensor([1, 1])),
        hostile(indices=torch.tensor([-1, 1])),
        hostile(indices=torch.tensor([1.5])),
        hostile(indices=torch.tensor([[1]])),
        hostile(columns=torch.tensor([1]).to(torch.uint16)),
        hostile({"format": "speft_optim.masks/2"}),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"PK\x03\x04 no safetensors file at all"),
        lambda path: path.write_bytes(b"\xff" * 64),
    ],
)
def test_load_refuses_foreign_and_hostile_files(write, tmp_path):
    path = tmp_path / "bad.safetensors"
    write(path)
    with pytest.raises(ValueError, match=r"bad\.safetensors is no readable file of Masks\.save \("):
        Masks.load(path)


def test_load_refuses_a_file_cut_short_at_any_place(masks, tmp_path):
    masks.save(tmp_path / "masks.safetensors")
    whole = (tmp_path / "masks.safetensors").read_bytes()
    for length in (1, 7, 8, 20, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut is no readable file of Masks\.save \(SafetensorError"):
            Masks.load(tmp_path / "cut")


def test_load_of_a_folder_asks_for_its_file(tmp_path):
    with pytest.raises(ValueError, match="is a folder; pass the file"):
        Masks.load(tmp_path)


def test_load_of_no_file_is_the_usual_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        Masks.load(tmp_path / "nowhere")


def test_a_failing_writer_leaves_the_old_file_and_nothing_else(masks, tmp_path):
    path = tmp_path / "masks.safetensors"
    masks.save(path)
    before = path.read_bytes()

    def fail(temporary):
        temporary.write_bytes(b"half")
        assert temporary.parent == tmp_path and temporary != path
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    write_atomically(path, lambda temporary: temporary.write_bytes(b"new"))
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_save_into_a_missing_folder_says_so(masks, tmp_path):
    with pytest.raises(ValueError, match="folder .*nowhere does not exist"):
        masks.save(tmp_path / "nowhere" / "masks.safetensors")


@pytest.mark.parametrize(
    "name, parts",
    [
        ("model.layers.3.mlp.up_proj.weight", ("layers.3", "up_proj")),
        ("transformer.h.11.attn.c_attn.weight", ("h.11", "c_attn")),
        ("model.layers.0.mlp.experts.gate_up_proj", ("layers.0", "gate_up_proj")),
        ("lm_head.weight", ("other", "lm_head")),
        ("weight", ("other", "weight")),
    ],
)
def test_names_split_into_layer_and_projection(name, parts):
    assert split_name(name) == parts


def test_summary_shows_every_layer_projection_and_total(masks):
    text = masks.summary()
    lines = text.splitlines()
    assert lines[0].split() == ["layer", "up_proj", "q_proj", "norm", "scale", "wide"]
    assert lines[1].split() == ["layers.1", f"{1334 / 4000:.3%}", "-", "-", "-", "-"]
    assert lines[2].split() == ["layers.0", f"{2 / 24:.3%}", "0.000%", "-", "-", "-"]
    total = sum(mask.shape.numel() for mask in masks.values())
    assert f"{masks.count:,} of {total:,} entries" in lines[-1]
    assert "in 6 weights, 1 of them without any" in lines[-1]
    assert masks.count == 1339 and masks.density == 1339 / total
    assert repr(masks["wide"]) == "Mask(shape=(65536, 65536), entries=1, density=0.0000%)"


def test_density_grid_adds_up_weights_of_one_cell():
    masks = Masks({"h.0.experts.0.up.weight": mask_of(1), "h.0.experts.1.up.weight": mask_of(1, 2, 3)})
    assert density_grid(masks) == (["h.0"], ["up"], [[4 / 48]])


def test_concentration_by_hand():
    # 90 % of 10 entries are in the first two of four rows; in the second, evenly spread one, in all four.
    assert concentration([torch.tensor([6, 3, 1, 0])]) == 0.5
    assert concentration([torch.tensor([6, 3, 1, 0]), torch.tensor([5, 5, 5, 5])]) == 0.75
    assert np.isnan(concentration([torch.zeros(4, dtype=torch.int64)]))


def test_a_picture_is_what_its_ending_says(masks, tmp_path):
    pytest.importorskip("matplotlib")
    begins = {"m.pdf": b"%PDF", "m.svg": b"<?xml", "m.PNG": b"\x89PNG", "m": b"\x89PNG"}
    for name, start in begins.items():
        masks.plot(tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)
    with pytest.raises(ValueError, match=r"\.txt is no picture format; append one such as \.png, of .*svg"):
        masks.plot(tmp_path / "m.txt")
    assert {path.name for path in tmp_path.iterdir()} == set(begins)


def test_plot_draws_a_picture_with_something_on_it(masks, tmp_path):
    image = pytest.importorskip("matplotlib.image")
    masks.plot(tmp_path / "masks.png")
    pixels = image.imread(tmp_path / "masks.png")
    assert min(pixels.shape[:2]) > 300 and len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 50
    assert list(tmp_path.iterdir()) == [tmp_path / "masks.png"]
    with pytest.raises(ValueError, match="no mask to draw"):
        Masks().plot(tmp_path / "none.png")


def test_numbers_of_weights_and_their_concentration_are_drawn_into_axes_of_ones_own(masks):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    heat, bars = figure.subplots(1, 2)
    masks.draw_means(heat, {name: 0.25 for name in masks}, scale=100)
    shown = heat.images[0].get_array()
    assert float(shown.min()) == float(shown.max()) == 25.0
    masks.draw_concentration(bars)
    assert len(bars.patches) == 2 * len(bars.get_xticks()) > 0
