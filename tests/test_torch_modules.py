"""Curvature of torch's own modules: attention, embeddings, norms, transposed convolutions."""

import copy

import pytest
import torch
from torch import nn

import margeq
from margeq.curvature.capture import record, run_recorded
from margeq.curvature.exact import ggn
from margeq.errors import MissingRuleError, UnsupportedLayerError
from margeq.laplace import accumulate
from margeq.parameters import named_weights
from margeq.testing.contracts import block_mask

F64 = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore::margeq.errors.ConvergenceWarning")


class Attends(nn.Module):
    """One attention layer under a linear head, sequences of three words of four numbers."""

    def __init__(self, inputs="same", lengths=(3, 3), calls=None, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, **options)
        self.head = nn.Linear(4, 3)
        self.inputs, self.lengths, self.calls = inputs, lengths, calls or {}

    def forward(self, x):
        layer, first = self.attention, self.attention.batch_first
        memory = x[:, : self.lengths[1]]
        triple = [x, memory, memory] if self.inputs == "memory" else [x, x, x]
        if self.inputs == "other":
            triple = [x, x.flip(1), 2.0 * x]
        if not layer._qkv_same_embed_dim:
            triple = [x, memory[..., : layer.kdim], memory[..., : layer.vdim]]
        if not first:
            triple = [sequence.transpose(0, 1) for sequence in triple]
        if self.inputs == "same" and layer._qkv_same_embed_dim:
            triple = [triple[0]] * 3
        y, _ = layer(*triple, **self.calls)
        y = y if first else y.transpose(0, 1)
        return self.head(y.tanh().sum(1))


CAUSAL = {"attn_mask": torch.ones(3, 3, dtype=torch.bool).triu(1), "is_causal": True}
ATTENTION = {
    "sequence first": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "own widths": {"kdim": 3, "vdim": 2},
    "own widths, batch first": {"kdim": 3, "vdim": 2, "batch_first": True, "lengths": (3, 2)},
    "three inputs": {"inputs": "other"},
    "causal": {"calls": CAUSAL},
    "masked": {"calls": {"attn_mask": torch.randn(3, 3, dtype=F64), "need_weights": False}},
    "zero attention": {"add_zero_attn": True, "calls": {"average_attn_weights": False}},
}


def words(n=5, length=3, width=4):
    torch.manual_seed(1)
    return torch.randn(n, length, width, dtype=F64), torch.randint(3, (n,))


def dense(model, batch):
    return ggn(model, [batch], margeq.Categorical())


def full(model, batch):
    return accumulate(model, [batch], curvature="full").curvature.matrix


def relative_errors(model, batch):
    """Per weight: distance of its Kronecker block from the block-diagonal of the dense GGN."""
    krons, exact = accumulate(model, [batch]).kron, dense(model, batch)
    errors, start = {}, 0
    for name, kron in krons.items():
        block = exact[start : start + kron.numel, start : start + kron.numel]
        start += kron.numel
        difference = (kron.to_dense() - block_mask(kron) * block).norm()
        errors[name] = float(difference / block.norm().clamp_min(1e-12))
    return errors


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_is_explained_and_its_full_curvature_dense(name):
    torch.manual_seed(0)
    model, batch = Attends(**ATTENTION[name]).double(), words()
    torch.testing.assert_close(full(model, batch), dense(model, batch), rtol=1e-10, atol=1e-13)
    errors = relative_errors(model, words(1))
    assert all(error < 1e-10 for weight, error in errors.items() if weight.endswith("bias"))
    for root in ("adaptive", "mc"):
        accumulate(model, [batch], hessian_root=root)


@pytest.mark.parametrize("name", ["sequence first", "three inputs", "own widths"])
def test_attention_to_a_single_word_is_exact(name):
    torch.manual_seed(0)
    options = {**ATTENTION[name], "lengths": (1, 1)}
    errors = relative_errors(Attends(**options).double(), words(1, length=1))
    assert max(errors.values()) < 1e-10


@pytest.mark.parametrize("name", ATTENTION)
def test_listening_does_not_change_what_attention_says(name):
    torch.manual_seed(0)
    model, (x, _) = Attends(**ATTENTION[name]).double().eval(), words()
    expected = model(x)
    with record(model, named_weights(model)) as uses:
        found = model(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    parts = 3 if "own widths" in name else 1
    assert [use.prefix for use in uses] == ["attention"] * parts + ["attention.out_proj", "head"]
    assert torch.equal(model(x), expected)


def test_a_padding_mask_reaches_attention():
    torch.manual_seed(0)
    x, y = words()

    class Padded(Attends):
        def forward(self, x):
            self.calls = {"key_padding_mask": x[..., 0] > 0.8}
            return super().forward(x)

    model = Padded(batch_first=True).double()
    torch.testing.assert_close(full(model, (x, y)), dense(model, (x, y)), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("frozen", ["in_proj", "out_proj", "bias"])
def test_frozen_parts_of_attention_are_left_out(frozen):
    torch.manual_seed(0)
    model, batch = Attends().double(), words()
    for name, parameter in model.attention.named_parameters():
        parameter.requires_grad_(frozen not in name)
    torch.testing.assert_close(full(model, batch), dense(model, batch), rtol=1e-10, atol=1e-13)


def test_packed_projections_of_unequal_lengths_are_refused_with_a_way_out():
    model, batch = Attends("memory", lengths=(3, 2)).double(), words()
    with pytest.raises(UnsupportedLayerError, match=r"3 and 2 positions.*kdim"):
        accumulate(model, [batch])


def test_attention_without_a_data_axis_is_refused():
    class Alone(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2)

        def forward(self, x):
            return self.attention(x, x, x)[0]

    with pytest.raises(UnsupportedLayerError, match="data axis"):
        accumulate(Alone(), [(torch.randn(3, 4), torch.randint(4, (3,)))])


class VisionTransformer(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.places = nn.Parameter(0.1 * torch.randn(1, 5, width))
        layer = nn.TransformerEncoderLayer(
            width, 2, 6, batch_first=True, activation="gelu", norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.gain = nn.Parameter(torch.tensor(1.3))
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], 1) + self.places
        return self.head(self.gain * self.encoder(tokens)[:, 0])


def pictures(n=5):
    torch.manual_seed(2)
    return torch.randn(n, 1, 4, 4, dtype=F64), torch.randint(3, (n,))


def test_a_vision_transformer_is_covered_tensor_by_tensor():
    torch.manual_seed(0)
    model, batch = VisionTransformer().double(), pictures()
    assert accumulate(model, [batch]).kron.keys() == dict(model.named_parameters()).keys()
    torch.testing.assert_close(full(model, batch), dense(model, batch), rtol=1e-10, atol=1e-13)
    errors = relative_errors(model, batch)
    for name in ("token", "places", "gain", "encoder.layers.0.norm1.bias", "patches.bias"):
        assert errors[name] < 1e-10, name
    for flavour in ("ekfac", "diag"):
        accumulate(model, [batch], curvature=flavour)


def test_batches_of_a_vision_transformer_add_up():
    torch.manual_seed(0)
    model, (x, y) = VisionTransformer().double(), pictures(7)
    whole = accumulate(model, [(x, y)]).kron
    parts = accumulate(model, list(zip(x.split(3), y.split(3), strict=True))).kron
    for name, kron in whole.items():
        torch.testing.assert_close(parts[name].to_dense(), kron.to_dense(), rtol=1e-10, atol=1e-13)


def test_a_vision_transformer_trains():
    torch.manual_seed(0)
    model, batch = VisionTransformer(), pictures(20)
    x, y = batch[0].float(), batch[1]
    token = model.token.detach().clone()
    result = margeq.optimize_marglik(
        model, [(x, y)], n_epochs=4, n_epochs_burnin=1, optimizer_kwargs={"lr": 0.01}, seed=0
    )
    rows = result.effective_dimension().tensors
    assert {row.name for row in rows} == dict(model.named_parameters()).keys()
    assert not torch.equal(model.token, token)


class Speaker(nn.Module):
    """A causal block with scaled-dot-product attention, as in GPT."""

    def __init__(self, width=4, words=6, tied=False):
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(3, width)
        self.norm, self.mix = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.out, self.head = nn.Linear(width, width), nn.Linear(width, words, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, x):
        places = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        h = self.words(x) + self.places(places)
        q, k, v = (
            part.unflatten(-1, (2, -1)).transpose(1, 2)
            for part in self.mix(self.norm(h)).chunk(3, -1)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.out(mixed.transpose(1, 2).flatten(2))
        return self.head(h)[:, -1]


def sentences(n=6):
    torch.manual_seed(3)
    return torch.randint(6, (n, 3)), torch.randint(6, (n,))


def test_a_speaking_network_is_covered_tensor_by_tensor():
    torch.manual_seed(0)
    model, batch = Speaker().double(), sentences()
    state = accumulate(model, [batch])
    assert state.kron.keys() == dict(model.named_parameters()).keys()
    torch.testing.assert_close(full(model, batch), dense(model, batch), rtol=1e-10, atol=1e-13)
    counts = torch.bincount(batch[0].flatten(), minlength=6)
    assert torch.equal(state.kron["words.weight"].input_cov.flatten(), counts.double())
    ekfac = accumulate(model, [batch], curvature="ekfac").curvature.blocks["words.weight"]
    assert float(ekfac.to_dense().trace()) == pytest.approx(
        float(dense(model, batch)[:24, :24].trace()), rel=1e-10
    )


@pytest.mark.parametrize("curvature", ["kfac", "full"])
def test_a_tied_embedding_is_refused(curvature):
    model, batch = Speaker(tied=True).double(), sentences()
    with pytest.raises(UnsupportedLayerError, match=r"'words.weight' is used by layers of diff"):
        accumulate(model, [batch], curvature=curvature)


@pytest.mark.parametrize(
    "options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}]
)
def test_embeddings_that_are_no_linear_maps_are_refused(options):
    model = nn.Sequential(nn.Embedding(6, 4, **options), nn.Flatten(), nn.Linear(12, 6))
    with pytest.raises(UnsupportedLayerError, match=next(iter(options))):
        accumulate(model, [sentences()])


def test_embeddings_of_too_many_words_are_refused_before_memory_is_taken(monkeypatch):
    monkeypatch.setattr("margeq.layers.embedding._MOST_NUMBERS", 100)
    model = nn.Sequential(nn.Embedding(6, 4), nn.Flatten(), nn.Linear(12, 6))
    with pytest.raises(UnsupportedLayerError, match="108 numbers; use smaller batches"):
        accumulate(model, [sentences()])


def test_a_unet_is_covered():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, 2, 1), nn.GroupNorm(2, 4), nn.ReLU(),
        nn.ConvTranspose2d(4, 2, 2, 2), nn.Flatten(), nn.Linear(32, 3),
    ).double()  # fmt: skip
    batch = pictures()
    torch.testing.assert_close(full(model, batch), dense(model, batch), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("layer", [nn.LSTM(4, 3), nn.GRU(4, 3), nn.Bilinear(4, 4, 3)])
def test_layers_of_torch_without_a_rule_are_named(layer):
    model = nn.ModuleDict({"recurrent": layer})
    with pytest.raises(MissingRuleError, match=rf"of recurrent \({type(layer).__name__}\)"):
        accumulate(model, [words()])


class Mine(nn.Linear):
    """Another forward than its parent's: the parent's rule would be wrong."""

    def forward(self, x):
        return super().forward(x.square())


def test_what_is_derived_from_a_layer_with_a_rule_needs_its_own():
    with pytest.raises(MissingRuleError, match=r"\(Mine\)"):
        accumulate(nn.Sequential(Mine(4, 3)), [(torch.randn(2, 4), torch.tensor([0, 1]))])


class Bare(nn.Module):
    """Parameters used in every way: per channel, in the middle, twice, as a matrix."""

    def __init__(self):
        super().__init__()
        self.gains = nn.Parameter(torch.rand(4) + 0.5)
        self.several = nn.ParameterList(
            [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.ones(()))]
        )
        self.unused = nn.Parameter(torch.zeros(2))
        self.first = nn.Linear(4, 4)

    def forward(self, x):
        h = self.first(x * self.gains).tanh() * self.gains
        return (h @ self.several[0]) * self.several[1].exp()


def rows(n=6):
    torch.manual_seed(4)
    return torch.randn(n, 4, dtype=F64), torch.randint(3, (n,))


def test_bare_parameters_are_exact():
    torch.manual_seed(0)
    model, batch = Bare().double(), rows()
    torch.testing.assert_close(full(model, batch), dense(model, batch), rtol=1e-10, atol=1e-13)
    errors = relative_errors(model, batch)
    for name in ("gains", "several.0", "several.1", "unused"):
        assert errors[name] < 1e-10, name


def test_many_bare_numbers_have_blocks_of_their_own(monkeypatch):
    monkeypatch.setattr("margeq.curvature.bare._LARGEST_BLOCK", 5)
    torch.manual_seed(0)
    model, batch = Bare().double(), rows()
    assert accumulate(model, [batch]).kron["several.0"].grad_cov.shape == (12, 1, 1)
    assert relative_errors(model, batch)["several.0"] < 1e-10


@pytest.mark.parametrize(("size", "shape"), [(512, (1, 512, 512)), (513, (513, 1, 1))])
def test_up_to_512_bare_numbers_are_one_block(size, shape):
    class Gains(nn.Module):
        def __init__(self):
            super().__init__()
            self.gains = nn.Parameter(torch.ones(size))

        def forward(self, x):
            return (x * self.gains).unflatten(1, (-1, 1)).sum(1).expand(-1, 2)

    state = accumulate(Gains(), [(torch.randn(3, size), torch.tensor([0, 1, 0]))])
    assert state.kron["gains"].grad_cov.shape == shape


PARAMETRISED = {
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)),
    "spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)),
    "orthogonal": lambda: nn.utils.parametrizations.orthogonal(nn.Linear(4, 3)),
}


@pytest.mark.parametrize("name", PARAMETRISED)
def test_parametrised_layers_are_named_with_their_way_out(name):
    with pytest.raises(MissingRuleError, match="remove_parametrizations"):
        accumulate(nn.Sequential(PARAMETRISED[name]()), [rows()])


def test_too_many_bare_numbers_need_a_rule(monkeypatch):
    monkeypatch.setattr("margeq.curvature.bare._LARGEST", 11)
    with pytest.raises(MissingRuleError, match=r"'several.0'"):
        accumulate(Bare().double(), [rows()])


def test_bare_parameters_start_where_they_are_whatever_is_drawn():
    torch.manual_seed(0)
    paths = margeq.layers.ResidualPathways({"a": Bare(), "b": nn.Linear(4, 3)})
    twin, (x, y) = copy.deepcopy(paths), rows()
    result = margeq.optimize_marglik(
        paths, [(x.float(), y)], n_epochs=1, n_epochs_burnin=1, optimizer_kwargs={"lr": 1e-9},
        restarts=["symmetric"], seed=0,
    )  # fmt: skip
    assert result.restarts[0].kept
    torch.testing.assert_close(paths.paths["a"].gains, twin.paths["a"].gains)
    assert not torch.allclose(paths.paths["a"].first.weight, twin.paths["a"].first.weight)


def test_bare_parameters_with_named_and_several_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain, self.map = nn.Parameter(torch.ones(4)), nn.Linear(4, 3)

        def forward(self, x, z):
            return self.map(self.gain * x + z)

    torch.manual_seed(0)
    model, (x, y) = Two().double(), rows()
    for inputs in ((x, x.flip(0)), {"x": x, "z": x.flip(0)}):
        found = full(model, (inputs, y))
        torch.testing.assert_close(found, dense(model, (inputs, y)), rtol=1e-10, atol=1e-13)


def test_models_that_vmap_cannot_run_are_named():
    class Branches(Bare):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)

    with pytest.raises(UnsupportedLayerError, match=r"'gains', 'unused', 'several.0'.*torch.vmap"):
        accumulate(Branches().double(), [rows()])


def test_hyperparameters_inside_do_not_move_beside_bare_parameters():
    class Shaped(nn.Module):
        def __init__(self):
            super().__init__()
            self.bare, self.sparse = Bare(), margeq.layers.SparseConv2d(1, 1, 3, padding=1)

        def forward(self, x):
            return self.sparse(self.bare(x)[:, None, None]).flatten(1)

    x, y = rows()
    with pytest.raises(UnsupportedLayerError, match=r"cannot move beside 'bare\.gains'"):
        margeq.optimize_marglik(
            Shaped(), [(x.float(), y)], n_epochs=3, n_epochs_burnin=1, network_gradient="exact"
        )


def test_outputs_with_bare_parameters_are_those_of_the_model():
    torch.manual_seed(0)
    model, (x, _) = Bare().double().eval(), rows()
    outputs, uses = run_recorded(model, named_weights(model), x)
    assert torch.equal(outputs, model(x))
    assert {use.prefix for use in uses} == {"", "several", "first"}
