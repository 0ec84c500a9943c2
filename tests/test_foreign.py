"""Bases of quantisers that cannot be trained: refused by name, with the remedy, and left as they were."""

import pytest
import torch
from conftest import random_masks, tiny_model, token_batch
from torch import nn

from speft_optim import Masks, load_adapter, save_adapter, select_masks, sparsify

NAME = "model.layers.0.self_attn.q_proj.weight"


class Codes(torch.Tensor):
    """A tensor subclass in the manner of torchao's: it claims a floating dtype and has no operation but `detach`."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(function)


def codes_of(weight):
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round().to(torch.int8), scale


class ByBuffers(nn.Module):
    """As GPTQ, AWQ and EETQ leave a linear layer: without a weight parameter."""

    def __init__(self, linear, name, dtype):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        codes, scale = codes_of(linear.weight.detach())
        self.register_buffer(name, codes.to(dtype))
        self.register_buffer("scales", scale)
        self.name = name

    def forward(self, x):
        return nn.functional.linear(x, getattr(self, self.name).float() * self.scales)


class ByParameter(nn.Module):
    """As HQQ, GGUF and fine-grained fp8 leave it: the codes are the parameter."""

    def __init__(self, linear, name, dtype):
        super().__init__()
        codes, scale = codes_of(linear.weight.detach())
        setattr(self, name, nn.Parameter(codes.to(dtype), requires_grad=False))
        self.scale, self.name = nn.Parameter(scale), name

    def forward(self, x):
        return nn.functional.linear(x, getattr(self, self.name).float() * self.scale)


def subclassed(linear):
    linear.weight = nn.Parameter(Codes(*codes_of(linear.weight.detach())), requires_grad=False)
    return linear


def torch_quantized(linear):
    module = nn.Sequential(linear)
    return torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8)[0]


BASES = {
    "tensor subclass": (subclassed, "float32 and is a Codes of test_foreign"),
    "fp8": (lambda linear: ByParameter(linear, "weight", torch.float8_e4m3fn), "float8_e4m3fn"),
    "hqq": (lambda linear: ByParameter(linear, "W_q", torch.uint8), "uint8"),
    "gptq": (lambda linear: ByBuffers(linear, "qweight", torch.int32), "int32"),
    "eetq": (lambda linear: ByBuffers(linear, "weight", torch.int8), "int8"),
    "fp8 buffer": (lambda linear: ByBuffers(linear, "weight", torch.float8_e4m3fn), "float8_e4m3fn"),
    "torch.ao": (torch_quantized, "Linear of torch.ao"),
}


def base_of(kind, only="layers"):
    model = tiny_model()
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and only in path:
            model.set_submodule(path, BASES[kind][0](module))
    return model


def state(model):
    return [(name, p.requires_grad, p.grad) for name, p in model.named_parameters()], model.training


REMEDY = r"cannot be trained.*bitsandbytes: BitsAndBytesConfig\(load_in_8bit"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("only", ["layers", "q_proj"])
@pytest.mark.parametrize("kind", BASES)
def test_a_base_of_another_quantiser_is_refused_before_anything_is_changed(kind, only, tmp_path):
    model, plain = base_of(kind, only), tiny_model()
    masks = random_masks(plain, density=0.1)
    sparsify(plain, masks)
    save_adapter(plain, tmp_path / "adapter.safetensors")
    before = state(model)
    by_name = rf"layers.0.*{BASES[kind][1]}.*{REMEDY}"
    for targets in (None, ["q_proj"]):
        for salience in ("gradient", "magnitude", "random"):
            with pytest.raises(TypeError, match=by_name):
                select_masks(model, [token_batch()], salience=salience, density=0.1, targets=targets)
            assert state(model) == before
    for some in (masks, Masks({NAME: masks[NAME]})):
        with pytest.raises(TypeError, match=by_name):
            sparsify(model, some)
    with pytest.raises(TypeError, match=by_name):
        load_adapter(model, tmp_path / "adapter.safetensors")
    assert state(model) == before


@pytest.mark.parametrize("kind", ["gptq", "eetq"])
def test_dense_weights_beside_layers_without_a_weight_can_be_named(kind):
    model = base_of(kind)
    masks = select_masks(model, [token_batch()], density=0.1, targets=["lm_head"], progress=False)
    sparsify(model, masks)
    model(**token_batch()).loss.backward()


@pytest.mark.parametrize("name", ["Embedding8bit", "Embedding4bit"])
def test_embeddings_of_bitsandbytes_stay_beside_what_is_trained(name, tmp_path):
    bnb = pytest.importorskip("bitsandbytes")

    def make():
        model = tiny_model(hidden_size=64)
        embedding = getattr(bnb.nn, name)(61, 64)
        embedding.load_state_dict(model.model.embed_tokens.state_dict())
        model.model.embed_tokens = embedding.to("cpu")
        return model

    model = make()
    sparsify(model, select_masks(model, [token_batch()], density=0.1, progress=False))
    model(**token_batch()).loss.backward()
    save_adapter(model, tmp_path / "adapter.safetensors")
    load_adapter(make(), tmp_path / "adapter.safetensors")
    with pytest.raises(TypeError, match="embed_tokens.weight has dtype torch.u?int8"):
        select_masks(make(), salience="random", density=0.1, targets=["embed_tokens"])


def test_tables_of_indices_are_no_quantised_weights():
    model = tiny_model()
    model.model.register_buffer("relative_position_index", torch.zeros(4, 4, dtype=torch.int32))
    model.model.layers[0].table = nn.Parameter(torch.zeros(4, 4, dtype=torch.int64), requires_grad=False)
    sparsify(model, select_masks(model, [token_batch()], density=0.1, progress=False, targets=["q_proj"]))
    with pytest.raises(TypeError, match="table has dtype torch.int64.*leave it out"):
        select_masks(tiny_like(model), salience="random", density=0.1, targets=["table"])


def tiny_like(model):
    other = tiny_model()
    other.model.layers[0].table = model.model.layers[0].table
    return other
