"""From candidate paths to a plain network: three trained ones hardened, saved, and read elsewhere.

The two questions of ``margeq demo``, with its network and its settings, and blocks of GCONV + CONV
on maps of p4 for turned digits. Each is hardened and saved as an exported program, as a state dict
and as ONNX; a fresh process that cannot import margeq loads the first two, onnxruntime the third.
Run with ``python -m experiments.harden_demo``.
"""

from __future__ import annotations

import logging
import math
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import margeq
from experiments.markdown import NOTHING, table
from experiments.records import RESULTS, versions, write_record
from margeq.convert import costs
from margeq.curvature.options import KfacOptions
from margeq.data import place_digits
from margeq.errors import ConvergenceWarning
from margeq.models import group_digit_network
from margeq.paths import path_sums
from margeq.runs.held_out import accuracy
from margeq.runs.questions import question_task
from margeq.runs.tasks import Task

__all__ = ["Options", "hardened", "summary_table", "task_of", "trained"]

EXPERIMENT = "harden_demo"
N_TIMED = 64
Name = Literal["digit", "corner", "p4"]

ELSEWHERE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "margeq":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
try:
    import margeq
except ModuleNotFoundError:
    pass
else:
    sys.exit("margeq can be imported")
import torch
folder = sys.argv[1]
torch.set_num_threads(1)
x, y = torch.load(f"{folder}/data.pt", weights_only=True)
whole = torch.export.load(f"{folder}/whole.pt2").module()
other = torch.export.load(f"{folder}/other.pt2").module()
with torch.no_grad():
    gaps = [float((model(x) - y).abs().max()) for model in (whole, other)]
    other.load_state_dict(torch.load(f"{folder}/weights.pt", weights_only=True))
    gaps.append(float((other(x) - y).abs().max()))
assert not [name for name in sys.modules if name.split(".")[0] == "margeq"]
print(*gaps)
"""
"""Prints largest differences: of the program, of one with other weights, with the right ones."""


@dataclass(frozen=True)
class Options:
    """All on one thread."""

    networks: tuple[Name, ...] = ("digit", "corner", "p4")
    """Which ones."""
    seed: int = 0
    """Of data, weights and the order of the batches."""
    epochs: int = 30
    """Of each start."""
    out: Path = RESULTS
    """Where the records go."""


def task_of(name: Name, seed: int) -> Task:
    """Network and data; the digits for p4 are turned by random quarters."""
    if name != "p4":
        return question_task(name, seed)
    digits = place_digits("digit", turned=True, seed=seed).standardised()
    return Task(
        group_digit_network(digits.n_classes),
        digits.train_loader(128, seed=seed),
        digits.marglik_loader(512),
        [(digits.test_images, digits.test_labels)],
    )


def trained(name: Name, task: Task, seed: int, epochs: int) -> margeq.MargLikResult:
    """Trained as ``margeq demo`` does; p4 also from its group convolutions alone."""
    groups = name == "p4"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return margeq.optimize_marglik(
            task.model,
            task.train_loader,
            marglik_loader=task.marglik_loader,
            n_epochs=epochs,
            n_epochs_burnin=min(6, epochs),
            marglik_frequency=3,
            optimizer_kwargs={"lr": 0.01},
            scheduler_cls=CosineAnnealingLR,
            scheduler_kwargs={"T_max": epochs * task.n_batches},
            curvature=KfacOptions("adaptive", position_fraction=0.25) if groups else "kfac",
            restarts=["symmetric", "only:gconv" if groups else "free"],
            seed=seed,
            progress="none",
        )


def hardened(task: Task, result: margeq.MargLikResult) -> dict[str, Any]:
    """Costs and differences of a trained network before and after, here and elsewhere.

    Returns:
        Figures by name.
    """
    assert task.held_out is not None
    x = next(iter(task.held_out))[0]
    model = task.model.eval()
    plain = margeq.harden(model, result, example_input=x).eval()
    everything = deepcopy(model)
    for sums in path_sums(everything).values():
        for path in sums.paths:
            sums.switch_on(path)
    rows = {}
    networks = {"candidates": everything, "selected": model, "plain": plain}
    for name, network in networks.items():
        rows[name] = asdict(costs(network, x[:N_TIMED], repeats=1))
        rows[name]["accuracy"] = accuracy(Task(network, [], held_out=task.held_out))
    with torch.no_grad():
        y, reference = plain(x), _without_off(model, result)(x)
    scale = float(reference.abs().max())
    with tempfile.TemporaryDirectory() as folder:
        program, other, weights = _elsewhere(plain, x, y, Path(folder))
        run, gap = _by_onnx(plain, x, y, Path(folder) / "plain.onnx")
    calls = {name: partial(network, x[:N_TIMED]) for name, network in networks.items()}
    latencies = _least_seconds(calls if run is None else {**calls, "onnx": run})
    for name, row in rows.items():
        row["latency"] = latencies[name]
    return {
        "selected": {layer: path for layer, path in result.selected.items()},
        "kept": next(r.start for r in result.restarts if r.kept),
        "n_pictures": len(x),
        "costs": rows,
        "difference": float((y - reference).abs().max()) / scale,
        "elsewhere": {
            "program": program / scale,
            "other weights": other / scale,
            "state dict": weights / scale,
        },
        "onnx": None if gap is None else {"difference": gap / scale, "latency": latencies["onnx"]},
    }


def _without_off(model: nn.Module, result: margeq.MargLikResult) -> nn.Module:
    """The trained network without what its result calls off."""
    copy = deepcopy(model)
    sums = path_sums(copy)
    for row in result.effective_dimension().paths:
        if row.verdict == "off":
            sums[row.layer].switch_off(row.path)
    return copy


def _elsewhere(plain: nn.Module, x: Tensor, y: Tensor, folder: Path) -> tuple[float, ...]:
    other = deepcopy(plain)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    sizes = ({0: torch.export.Dim.AUTO},)
    for name, network in {"whole": plain, "other": other}.items():
        program = torch.export.export(network, (x,), dynamic_shapes=sizes)
        torch.export.save(program, folder / f"{name}.pt2")
    torch.save(plain.state_dict(), folder / "weights.pt")
    torch.save((x, y), folder / "data.pt")
    command = [sys.executable, "-I", "-c", ELSEWHERE, str(folder)]
    found = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    return tuple(map(float, found.stdout.split()))


def _by_onnx(
    plain: nn.Module, x: Tensor, y: Tensor, file: Path
) -> tuple[Callable[[], Any] | None, float | None]:
    """A call, and the largest difference; nothing without onnxscript and onnxruntime."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  what torch exports with
    except ModuleNotFoundError:
        return None, None
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sizes = ({0: torch.export.Dim("n")},)
        torch.onnx.export(plain, (x,), file, dynamo=True, verbose=False, dynamic_shapes=sizes)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    (found,) = session.run(None, {name: x.numpy()})
    few = {name: x[:N_TIMED].numpy()}
    return partial(session.run, None, few), float((torch.from_numpy(found) - y).abs().max())


@torch.no_grad()
def _least_seconds(calls: Mapping[str, Callable[[], Any]], repeats: int = 100) -> dict[str, float]:
    """The least of many calls, in turn: what other work on the machine disturbs least."""
    least = dict.fromkeys(calls, math.inf)
    for _ in range(repeats):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            least[name] = min(least[name], time.perf_counter() - began)
    return least


def summary_table(records: list[dict[str, Any]]) -> str:
    """Four rows per network.

    Returns:
        Markdown.
    """
    rows = []
    for r in records:
        for name, found in r["costs"].items():
            difference = f"{r['difference']:.1e}" if name == "plain" else NOTHING
            rows.append(
                [
                    r["network"], name, f"{found['active_parameters']:,}", f"{found['macs']:,}",
                    f"{1e3 * found['latency']:.2f}", difference, f"{100 * found['accuracy']:.1f}",
                ]
            )  # fmt: skip
        if r["onnx"] is not None:
            onnx = r["onnx"]
            latency = f"{1e3 * onnx['latency']:.2f}"
            rows.append(
                [r["network"], "ONNX", *2 * ["as plain"], latency, f"{onnx['difference']:.1e}", ""]
            )
    header = ("network", "model", "parameters", "MACs", "latency ms", "difference", "accuracy %")
    return table(header, rows, 2)


def main(options: Options) -> None:
    """Train, harden and measure, and print the table."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # weights that are priced out become denormal, which is slow
    records = []
    software = versions()
    for name in options.networks:
        began = time.perf_counter()
        task = task_of(name, options.seed)
        result = trained(name, task, options.seed, options.epochs)
        figures = {"training_seconds": time.perf_counter() - began, **hardened(task, result)}
        records.append({"network": name, **asdict(options), **figures, "versions": software})
        records[-1]["out"] = ""
        write_record(options.out / EXPERIMENT / f"{name}-seed{options.seed}.json", records[-1])
    print(summary_table(records))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
