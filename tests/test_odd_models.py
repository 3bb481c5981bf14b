"""Models as users bring them: a right number against the dense GGN, or an error that says why."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import margeq
from margeq.curvature.exact import ggn
from margeq.errors import (
    DataError,
    MissingRuleError,
    ModelWarning,
    NonFiniteError,
    UnsupportedLayerError,
)
from margeq.laplace import accumulate
from tests.vision_networks import torchvision

F64 = torch.float64
pytestmark = [
    pytest.mark.filterwarnings("ignore::margeq.errors.ConvergenceWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
]
BATCHES = {  # n differs from every other size
    "sequences": lambda: (torch.randn(5, 3, 4, dtype=F64), torch.randint(3, (5,))),
    "pictures": lambda: (torch.randn(5, 1, 4, 4, dtype=F64), torch.randint(3, (5,))),
    "colours": lambda: (torch.randn(5, 3, 8, 8, dtype=F64), torch.randint(3, (5,))),
    "words": lambda: (torch.randint(6, (7, 3)), torch.randint(6, (7,))),
}


def batch(kind: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return BATCHES[kind]()


def single(inputs):
    """In float32, whatever the structure."""
    if isinstance(inputs, Tensor):
        return inputs.float() if inputs.dtype == F64 else inputs
    if isinstance(inputs, dict):
        return {name: single(value) for name, value in inputs.items()}
    return type(inputs)(map(single, inputs))


def train(model: nn.Module, loader, **options) -> margeq.MargLikResult:
    return margeq.optimize_marglik(
        model, loader, n_epochs=2, n_epochs_burnin=1, marglik_frequency=1, seed=0,
        optimizer_kwargs={"lr": 0.01}, **options,
    )  # fmt: skip


def require_covered(model: nn.Module, data, **options) -> None:
    """Each trainable tensor has a block, the dense curvature is the oracle's, and it trains."""
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    model = model.double()
    pairs = [options["batch_fn"](data)] if options else [data]
    exact = ggn(model, pairs, margeq.Categorical())
    found = accumulate(model, [data], curvature="full", **options).curvature.matrix
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-13)
    kron = accumulate(model, [data], **options).kron
    assert kron.keys() == trainable
    ekfac = accumulate(model, [data], curvature="ekfac", **options).curvature.blocks
    trace = sum(float(block.to_dense().trace()) for block in ekfac.values())
    assert trace == pytest.approx(float(exact.trace()), rel=1e-9)
    result = train(model.float(), [single(data)], **options)
    assert {row.name for row in result.effective_dimension().tensors} >= trainable


# -- transformers and recurrent networks -----------------------------------------------------------


class Pictures(nn.Module):
    """A vision transformer with attention of its own."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.places = nn.Parameter(0.1 * torch.randn(1, 5, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, dropout=0.1, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 6), nn.GELU(), nn.Dropout(), nn.Linear(6, width))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.token.expand(len(x), -1, -1), tokens], 1) + self.places
        z = self.norm1(h)
        h = h + self.attention(z, z, z, need_weights=False)[0]
        return self.head((h + self.mlp(self.norm2(h)))[:, 0])


class Speaker(nn.Module):
    """A block as in GPT, with torch's attention or with projections of its own."""

    def __init__(self, own: bool, expanded: bool = True, width: int = 4) -> None:
        super().__init__()
        self.own, self.expanded = own, expanded
        self.words, self.places = nn.Embedding(6, width), nn.Embedding(3, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        if own:
            self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
            self.out = nn.Linear(width, width)
        else:
            self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 6), nn.GELU(), nn.Linear(6, width))
        self.head = nn.Linear(width, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        h = self.words(x) + self.places(places.expand(len(x), -1) if self.expanded else places)
        h = h + self.attended(self.norm1(h))
        return self.head(h + self.mlp(self.norm2(h)))[:, -1]

    def attended(self, z: Tensor) -> Tensor:
        n, t, width = z.shape
        if not self.own:
            later = torch.ones(t, t, dtype=torch.bool).triu(1)
            return self.attention(z, z, z, attn_mask=later, need_weights=False)[0]
        q, k, v = (f(z).view(n, t, 2, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(n, t, width))


class Encoder(nn.Module):
    def __init__(self, masked: bool = False, dropout: float = 0.1) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=dropout, batch_first=True)
        self.encoder, self.masked = nn.TransformerEncoder(layer, 2), masked
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        mask = None
        if self.masked:
            mask = torch.zeros(x.shape[:2], dtype=torch.bool)
            mask[:, -1] = x[:, -1, 0] > 0
        return self.head(self.encoder(x, src_key_padding_mask=mask)[:, 0])


def torchvision_transformer() -> nn.Module:
    model = torchvision().models.VisionTransformer(
        image_size=8, patch_size=4, num_layers=1, num_heads=2, hidden_dim=4, mlp_dim=6,
        num_classes=3, dropout=0.1,
    )  # fmt: skip
    nn.init.normal_(model.class_token)
    nn.init.normal_(model.heads.head.weight)  # torchvision starts with zeros
    return model


COVERED = {
    "own vision transformer": (Pictures, "pictures"),
    "torchvision's vision transformer": (torchvision_transformer, "colours"),
    "torch's attention": (lambda: Speaker(own=False), "words"),
    "own projections": (lambda: Speaker(own=True), "words"),
    "encoder": (Encoder, "sequences"),
    "encoder in evaluation mode": (lambda: Encoder().eval(), "sequences"),
    "encoder with padding": (lambda: Encoder(masked=True, dropout=0.0), "sequences"),
}


@pytest.mark.parametrize("name", COVERED)
def test_transformers_are_covered_tensor_by_tensor(name):
    torch.manual_seed(0)
    make, kind = COVERED[name]
    require_covered(make(), batch(kind))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.lstm = nn.Embedding(6, 4), nn.LSTM(4, 3, batch_first=True)
        self.head = nn.Linear(3, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.words(x))[0][:, -1])


def test_recurrent_weights_are_named_and_the_rest_works():
    torch.manual_seed(0)
    model, data = Recurrent(), batch("words")
    others = "'lstm.weight_hh_l0', 'lstm.bias_ih_l0', 'lstm.bias_hh_l0'"
    ways_out = (
        rf"'lstm.weight_ih_l0' of lstm \(LSTM\), nor for {others}.*requires_grad.*parameters="
    )
    for act in (accumulate, train):
        with pytest.raises(MissingRuleError, match=ways_out):
            act(model, [data])
    before = model.lstm.weight_hh_l0.detach().clone()
    rest = ["words.weight", "head.weight", "head.bias"]
    result = train(model, [data], parameters=rest)
    assert not torch.equal(model.lstm.weight_hh_l0, before)  # trained, without a prior
    assert result.prior.groups.keys() == set(rest)
    model.lstm.requires_grad_(False)
    require_covered(model, data)


def test_a_gradient_of_rounding_alone_is_explained():
    """That of the keys' bias: a softmax does not see it."""
    x, y = batch("words")
    for seed in range(6):
        torch.manual_seed(seed)
        speaker = Speaker(own=True, width=8)
        accumulate(speaker, [(x, y)])
        with torch.no_grad():
            for p in speaker.parameters():
                p.mul_(4.0)
        accumulate(speaker, [(x, y)])


# -- rows that are no data -------------------------------------------------------------------------


class SequenceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.map(x.transpose(0, 1)).tanh().sum(0))


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("act", [accumulate, train])
def test_a_data_axis_that_is_not_first_is_found_at_any_number_of_data(act, n):
    """Also where there are as many data as positions, and the shapes look right."""
    torch.manual_seed(0)
    x, y = batch("sequences")
    with pytest.raises(UnsupportedLayerError, match=r"map \(Linear\) .* rows .*batch_first=True"):
        act(SequenceFirst(), [(x[:n].float(), y[:n])])
    words, following = batch("words")
    speaker = Speaker(own=True, expanded=False)
    with pytest.raises(UnsupportedLayerError, match=r"places \(Embedding\).*expand\(n, -1\)"):
        act(speaker, [(words[:n], following[:n])])


def test_a_model_of_one_batch_size_is_not_compared():
    class Three(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.view(3, 4))

    margeq.register_kfac_rule(Three)(
        lambda layer, x, grads: {
            "weight": margeq.LinearIO(x[:, None, None], grads[:, :, None, None]),
        }
    )
    torch.manual_seed(0)
    model, (x, y) = Three(4, 3, bias=False).double(), batch("sequences")
    data = (x[:3, 0], y[:3])
    exact = ggn(model, [data], margeq.Categorical())
    found = accumulate(model, [data], curvature="full").curvature.matrix
    torch.testing.assert_close(found, exact)


@pytest.mark.parametrize("error", [AssertionError, IndexError, KeyError, AttributeError, Exception])
def test_a_model_of_one_batch_size_may_say_so_by_any_error(error):
    class OfFive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            if len(x) != 5:
                raise error("five data, please")
            return self.head(x[:, 0])

    torch.manual_seed(0)
    data, model = batch("sequences"), OfFive().double()
    torch.testing.assert_close(
        accumulate(model, [data], curvature="full").curvature.matrix,
        ggn(model, [data], margeq.Categorical()),
    )


# -- ways of writing a model -----------------------------------------------------------------------


class Named(nn.Module):
    """Layers in a dictionary, one of them called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"again": nn.Linear(4, 4), "last": nn.Linear(4, 3)})

    def forward(self, x: Tensor) -> Tensor:
        x = x.sum(1)
        for _ in range(3):
            x = self.layers["again"](x).tanh()
        return self.layers["last"](x)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(x).tanh()).tanh().sum(1))


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.sum(1)
        return self.head((self.one if float(x.detach().sum()) > 0 else self.two)(x).tanh())


class WithoutGradient(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fixed, self.head = nn.Linear(12, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            x = self.fixed(x.flatten(1))
        return self.head(x.clone().tanh())


def last_channels() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    return model.to(memory_format=torch.channels_last)


def compiled() -> nn.Module:
    return torch.compile(
        nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 3)), backend="eager"
    )


WRITTEN = {
    "dictionary": (Named, "sequences"),
    "tied": (Tied, "sequences"),
    "branches": (Branches, "sequences"),
    "without gradient": (WithoutGradient, "sequences"),
    "channels last": (last_channels, "colours"),
    "log-softmax": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.LogSoftmax(1)), "sequences"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN)
def test_odd_models_are_covered_tensor_by_tensor(name):
    torch.manual_seed(0)
    make, kind = WRITTEN[name]
    x, y = batch(kind)
    if name == "channels last":
        x = x.to(memory_format=torch.channels_last)
    require_covered(make(), (x, y))


def test_a_compiled_model_is_that_model():
    torch.manual_seed(0)
    model, data = compiled().double(), batch("sequences")
    found = accumulate(model, [data], curvature="full").curvature.matrix
    torch.testing.assert_close(found, ggn(model, [data], margeq.Categorical()))


class Two(nn.Module):
    """Words and numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(6, 4), nn.Linear(4, 6)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head((self.words(input_ids) * attention_mask[..., None]).sum(1).tanh())


def test_inputs_as_tuples_lists_dictionaries_and_by_a_function():
    torch.manual_seed(0)
    ids, labels = batch("words")
    mask = (ids > 0).double()
    both = {"input_ids": ids, "attention_mask": mask}
    for inputs in ((ids, mask), [ids, mask], both):
        require_covered(Two(), (inputs, labels))

    def pair(given):
        return {name: given[name] for name in both}, given["labels"]

    require_covered(Two(), {**both, "labels": labels}, batch_fn=pair)
    with pytest.raises(DataError, match=r"a dict with the keys .*, not a pair.*batch_fn=lambda"):
        accumulate(Two(), [{**both, "labels": labels}])


class Returns(nn.Module):
    def __init__(self, wrap) -> None:
        super().__init__()
        self.map, self.wrap, self.gain = nn.Linear(12, 3), wrap, nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> object:
        return self.wrap(self.gain * self.map(x.flatten(1)))


class Output:
    """As other libraries return their logits."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


@pytest.mark.parametrize("act", [accumulate, train])
@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (
            lambda y: (y, y),
            "a tuple for 5 data, expected a tensor .* whose forward returns the log",
        ),
        (lambda y: {"logits": y}, "a dict for 5 data"),
        (Output, "a Output for 5 data"),
        (lambda y: y.sum(), r"\(\) for 5 data, expected one row per datum"),
        (lambda y: y[:4], r"\(4, 3\) for 5 data"),
    ],
)
def test_outputs_that_are_no_tensor_of_rows(act, wrap, message):
    x, y = batch("sequences")
    with pytest.raises(DataError, match=message):
        act(Returns(wrap), [(x.float(), y)])


def test_experts_that_see_some_of_the_data_are_refused():
    class Experts(Branches):
        def forward(self, x: Tensor) -> Tensor:
            x = x.sum(1)
            first = x[:, 0] > 0
            y = torch.empty_like(x)
            y[first], y[~first] = self.one(x[first]), self.two(x[~first])
            return self.head(y)

    torch.manual_seed(0)
    with pytest.raises(UnsupportedLayerError, match=r"one \(Linear\) was called with \d rows for"):
        accumulate(Experts().double(), [batch("sequences")])


def test_probabilities_in_place_of_logits_are_warned_of():
    x, y = batch("sequences")
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.Softmax(1))
    with pytest.warns(ModelWarning, match="probabilities, which classification takes for logits"):
        train(model, [(x.float(), y)])
    targets = torch.randn(5, 3)
    train(model, [(x.float(), targets)], likelihood="regression")  # there they are means


def test_half_precision():
    torch.manual_seed(0)
    x, y = batch("pictures")
    values = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
        result = train(model.to(dtype), [(x.to(dtype), y)])
        values[dtype] = result.log_marginal_likelihood
    assert values[torch.bfloat16] == pytest.approx(values[torch.float32], rel=0.02)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).half()
    with pytest.raises(DataError, match=r"batch 0 with inputs \(5, 1, 4, 4\) torch.float32.*Half"):
        train(model, [(x.float(), y)])
    with pytest.raises(NonFiniteError, match="lower the learning rate or leave float16"):
        train(model, [(x.half(), y)])  # Adam's epsilon is zero there
