"""What every model promises: kernels and reference agree, no host sync, one graph, bad input named, no NaN."""

import doctest
import importlib
import pkgutil
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_samples import SMALL, Episode, balanced, episode, small
from test_memory import held, visible
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import fss_kernels
import fss_models
from fss_kernels import _op, testing
from fss_models import DPCN, build
from fss_models.backbones import Tiny
from fss_models.model import labels_of

MODELS = tuple(SMALL)
OPS = {
    "dpcn": {"masked_avg_pool", "dense_cosine_max", "dynamic_conv2d"},
    "dpnet": {"masked_avg_pool", "dense_cosine_max", "dense_cosine_match"},
    "panet": {"masked_avg_pool", "prototype_cosine"},
}


@pytest.fixture
def backend_calls(monkeypatch):
    """Counts of (op, backend, direction) of what really ran."""
    calls: Counter[tuple[str, str, str]] = Counter()

    def counted(key, function):
        def call(*args):
            calls[key] += 1
            return function(*args)

        return call

    for name, op in _op.ops.items():
        for backend, implementation in op.backends.items():
            for direction in ("forward", "backward"):
                function = counted((name, backend, direction), getattr(implementation, direction))
                monkeypatch.setattr(implementation, direction, function)
    return calls


def results(model, e, gradients: bool = True):
    """Logits, loss and the gradient of every parameter that trains."""
    logits, loss = model(*e[:3]), model.loss(*e)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return logits.detach(), loss.detach(), torch.autograd.grad(loss, parameters) if gradients else ()


# ---- kernels and reference ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shots", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", MODELS)
def test_kernels_agree_with_the_reference(name, dtype, shots, training, backend_calls):
    e = episode(shots=shots).to(dtype)
    model = small(name, dtype).train(training)
    if name != "panet":
        balanced(model, e)
    runs, counts = [], []
    for backend in ("cpp", "reference"):
        backend_calls.clear()
        with fss_kernels.use_backend(backend):
            runs.append(results(model, e))
        assert {b for _, b, _ in backend_calls} == {backend}
        counts.append({(op, direction): n for (op, _, direction), n in backend_calls.items()})
    assert counts[0] == counts[1]
    assert {op for op, direction in counts[0] if direction == "forward"} == OPS[name]
    (logits, loss, gradients), (expected_logits, expected_loss, expected_gradients) = runs
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(logits, expected_logits, **tolerance)
    torch.testing.assert_close(loss, expected_loss, **tolerance)
    if dtype == torch.float64:
        assert any((g != 0).any() for g in gradients)
        for got, want in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-10)


def test_support_activation_reaches_both_sides_of_layer4(backend_calls):
    """Windows on PASCAL, by one forward and one backward of the kernel in each direction; the prior on COCO."""
    e = episode()
    model = balanced(small("dpcn", trainable_backbone=(4,)), e)
    backend_calls.clear()
    model.loss(*e).backward()
    for direction in ("forward", "backward"):
        assert backend_calls["dense_cosine_max", "cpp", direction] == 2
    assert all((p.grad != 0).any() for p in model.backbone.layer4.parameters())
    frozen = balanced(small("dpcn", **fss_models.dpcn.COCO), e)
    backend_calls.clear()
    frozen.loss(*e).backward()
    assert backend_calls["dense_cosine_max", "cpp", "forward"] == 2
    assert backend_calls["dense_cosine_max", "cpp", "backward"] == 0


@pytest.mark.parametrize("name", MODELS)
def test_training_and_evaluation_differ_by_dropout_alone(name):
    e = episode()
    options = {} if name == "panet" else {"mid_dropout": 0.5, "cls_dropout": 0.1}
    plain, dropping = small(name), small(name, **options)
    torch.testing.assert_close(plain.train()(*e[:3]), plain.eval()(*e[:3]), rtol=0, atol=0)
    torch.testing.assert_close(dropping.eval()(*e[:3]), plain(*e[:3]), rtol=0, atol=0)
    if name != "panet":
        assert not torch.allclose(dropping.train()(*e[:3]), plain(*e[:3]))


# ---- layouts, sizes, threads, memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [name for name in testing.LAYOUTS if name != "contiguous"])
@pytest.mark.parametrize("name", MODELS)
def test_layouts(name, layout):
    """Images and labels in other strides."""
    e = episode(shots=2).to(torch.float64)
    model, changed = small(name, torch.float64), Episode(*map(testing.LAYOUTS[layout], e))
    assert {t.is_contiguous() for t in changed} == {layout == "offset"} or layout.startswith("channels_last")
    plain = Episode(*(t.contiguous() for t in changed))
    torch.testing.assert_close(results(model, changed), results(model, plain), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", MODELS)
@given(
    batch=st.integers(1, 3), shots=st.integers(1, 3), size=st.tuples(*[st.integers(9, 41)] * 2),
    share=st.floats(0, 1), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=15, deadline=None, derandomize=True, database=None)
def test_any_episode(name, batch, shots, size, share, seed):
    """Kernels and reference agree, and every sample alone has the result that it has in the batch."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, 3, *size, generator=generator, dtype=torch.float64)
    support = torch.randn(batch, shots, 3, *size, generator=generator, dtype=torch.float64)
    mask = (torch.rand(batch, shots, *size, generator=generator) < share).long()
    model, tolerance = small(name, torch.float64), {"rtol": 1e-9, "atol": 1e-11}
    whole = model(query, support, mask)
    with fss_kernels.use_backend("reference"):
        torch.testing.assert_close(whole, model(query, support, mask), **tolerance)
    for b in range(batch):
        alone = model(query[b : b + 1], support[b : b + 1], mask[b : b + 1])
        torch.testing.assert_close(whole[b : b + 1], alone, **tolerance)


@pytest.mark.parametrize("name", MODELS)
def test_python_threads(name):
    """Two threads at once have the bits of one alone, other episodes at the same time."""
    model, episodes = small(name), [episode(seed=0), episode(shots=3, seed=1)]
    alone, start = [results(model, e) for e in episodes], threading.Barrier(2)

    def run(worker):
        start.wait()
        return [(i, results(model, episodes[i])) for i in ((turn + worker) % 2 for turn in range(4))]

    with ThreadPoolExecutor(2) as pool:
        for i, found in (result for worker in pool.map(run, range(2)) for result in worker):
            for got, want in zip((*found[:2], *found[2]), (*alone[i][:2], *alone[i][2]), strict=True):
                assert torch.equal(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_calls_leave_nothing_behind(name):
    """Training steps, and episodes that are refused."""
    model, e = small(name), episode(batch=1, size=(17, 17))
    bad = e._replace(target=e.target[:, 1:])

    def call():
        model.zero_grad()
        model.loss(*e).backward()
        with pytest.raises(ValueError, match="target must have shape"):
            model.loss(*bad)

    for _ in range(30):
        call()
    known = visible()
    before = held()
    for _ in range(1000):
        call()
    assert held() - before < 16 * 1000  # the smallest block is of 32 bytes
    ids_of_known = {id(t) for t in known}
    assert not [t.shape for t in visible() if id(t) not in ids_of_known]


# ---- tracing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shots", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_no_host_sync(name, shots):
    """Forward, loss and backward on tensors without data: anything that needed a value would raise."""
    with FakeTensorMode():
        model = build(name, Tiny(8), **SMALL[name])
        query, support = torch.randn(2, 3, 33, 33), torch.randn(2, shots, 3, 33, 33)
        mask, target = torch.zeros(2, shots, 33, 33).long(), torch.zeros(2, 33, 33).long()
        assert model(query, support, mask).shape == (2, 2, 33, 33)
        loss = model.loss(query, support, mask, target)
        assert loss.shape == ()
        loss.backward()
        with pytest.raises(DataDependentOutputException):
            loss.item()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dpcn", {"square_from": "fg", "generator_kernel": 3, "kernel_size": 3}),
        ("dpcn", {"sam": False, "ffm": False, "premask_layer4": True, "kernels": ("square",), "kernel_size": 9}),
        ("dpcn", {"dcm": False, "swap_weight": 0.0}),
        ("dpnet", {"bins": (1.0, 0.5)}),
        ("panet", {"stage": 3}),
    ],
)
def test_options_train_without_host_sync(name, options):
    e = episode(shots=2)
    assert small(name, **options).loss(*e).isfinite()
    with FakeTensorMode():
        model = build(name, Tiny(8), **SMALL[name] | options)
        arguments = [torch.randn(t.shape) for t in e[:2]] + [torch.zeros(t.shape).long() for t in e[2:]]
        model.loss(*arguments).backward()


@pytest.mark.parametrize("name", ["dpcn", "dpnet"])
def test_head_compiles_to_one_graph(name):
    """Forward and backward of the head in one graph each, with the values of eager code."""
    torch._dynamo.reset()
    model, e = small(name, torch.float64), episode().to(torch.float64)
    query, support = ([f.detach() for f in side] for side in model.encode(e.query, e.support))
    features = fss_models.Features(*query), fss_models.Features(*support)
    mask = (e.mask == 1).double()
    compiled = torch.compile(model.head, fullgraph=True, backend="aot_eager")
    outcomes = []
    for head in (model.head, compiled):
        logits = head(*features, mask)
        logits = logits if name == "dpcn" else logits[0]
        outcomes.append((logits, *torch.autograd.grad(logits.square().sum(), [*model.head.down_query.parameters()])))
    for got, want in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, want)
    torch._dynamo.reset()


def test_export():
    model, e = small("dpcn").eval(), episode()
    program = torch.export.export(model, tuple(e[:3]))
    torch.testing.assert_close(program.module()(*e[:3]), model(*e[:3]))
    assert any("dynamic_conv2d" in str(n.target) for n in program.graph.nodes)


# ---- numerical safety -----------------------------------------------------------------------------------------------


def finite(model, e, **autocast) -> bool:
    with torch.autocast("cpu", **autocast) if autocast else torch.enable_grad():
        logits, loss = model(*e[:3]), model.loss(*e)
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return bool(logits.isfinite().all() and loss.isfinite() and all(g.isfinite().all() for g in gradients))


@pytest.mark.parametrize("case", ["flat", "empty masks", "full masks", "all ignored", "one pixel", "zero images"])
@pytest.mark.parametrize("name", MODELS)
def test_no_nan(name, case):
    e = episode(shots=2)
    if case == "flat":
        e = e._replace(query=torch.ones_like(e.query), support=torch.ones_like(e.support))
    elif case == "zero images":
        e = e._replace(query=0 * e.query, support=0 * e.support)
    elif case == "all ignored":
        e = e._replace(target=torch.full_like(e.target, 255), mask=torch.full_like(e.mask, 255))
    else:
        mask = torch.full_like(e.mask, int(case == "full masks"))
        mask[..., 9, 9] = int(case != "empty masks")
        e = e._replace(mask=mask)
    assert finite(small(name), e)
    if case == "all ignored":
        assert small(name).loss(*e) == 0


@pytest.mark.parametrize("name", MODELS)
def test_autocast(name):
    """bfloat16 where autocast says so, score maps and losses in float32, near the float32 results."""
    e = episode(shots=2)
    model = small(name)
    assert finite(model, e, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, loss = model(*e[:3]), model.loss(*e)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(model.loss(*e).item(), rel=0.05)
    exact = model(*e[:3])
    assert (logits.float() - exact).abs().mean() < 0.1 * exact.std() + 0.02


# ---- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32, torch.bfloat16])
def test_labels(dtype):
    """1 is foreground whatever the dtype; 255 and everything else are not."""
    values = torch.tensor([0, 1, 255, 7])
    expected = torch.tensor([0, 1, 255, 0])
    if dtype == torch.bool:
        values, expected = torch.tensor([0, 1]), torch.tensor([0, 1])
    assert torch.equal(labels_of(values.to(dtype)), expected)
    e = episode()
    binary = (e.mask == 1).to(dtype)
    model = small("dpcn")
    torch.testing.assert_close(model(e.query, e.support, binary), model(e.query, e.support, e.mask), rtol=0, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_masks_of_the_support_matter_and_ignored_is_not_foreground(name):
    e = episode()
    model = small(name)
    whole = torch.where(e.mask == 255, 1, e.mask)
    assert not torch.allclose(model(e.query, e.support, e.mask), model(e.query, e.support, whole))
    background = torch.where(e.mask == 255, 0, e.mask)
    same = torch.allclose(model(e.query, e.support, e.mask), model(e.query, e.support, background))
    assert same == (name != "panet")  # PANet has a background prototype


@pytest.mark.parametrize("name", MODELS)
def test_samples_do_not_mix(name):
    e = episode(batch=3, shots=2).to(torch.float64)
    model = small(name, torch.float64)
    whole = model(*e[:3])
    for b in range(3):
        alone = model(*(t[b : b + 1] for t in e[:3]))
        torch.testing.assert_close(whole[b : b + 1], alone)


@pytest.mark.parametrize("name", MODELS)
def test_order_of_shots(name):
    """Prototypes and maps are means over the shots; only DPCN's dynamic kernels see their order."""
    e = episode(shots=3).to(torch.float64)
    model = small(name, torch.float64, **({"dcm": False} if name == "dpcn" else {}))
    turned = model(e.query, e.support.flip(1), e.mask.flip(1))
    torch.testing.assert_close(turned, model(*e[:3]))


BAD = {
    "query": [
        (lambda e: e._replace(query=e.query[0]), ValueError, r"query must have shape \(B, 3, H, W\)"),
        (lambda e: e._replace(query=e.query[:, :2]), ValueError, r"query must have shape \(2, 3, 33, 41\)"),
        (lambda e: e._replace(query=e.query.long()), TypeError, "query must have dtype float32, .*, got int64"),
        (lambda e: e._replace(query=None), TypeError, "query must be a torch.Tensor, got NoneType"),
        (lambda e: e._replace(query=e.query[:0]), ValueError, "query has no elements, got shape"),
    ],
    "support": [
        (lambda e: e._replace(support=e.support[:, 0]), ValueError, r"support must have shape \(B, S, 3, H, W\)"),
        (lambda e: e._replace(support=e.support[:1]), ValueError, r"support must have shape \(2, 1, 3, 33, 41\)"),
        (lambda e: e._replace(support=e.support[..., 1:]), ValueError, r"support must have shape \(2, 1, 3, 33, 41\)"),
        (lambda e: e._replace(support=e.support[:, :0]), ValueError, "support has no elements, got shape"),
        (lambda e: e._replace(support=e.support.to("meta")), ValueError, "support must be on the device of query"),
    ],
    "mask": [
        (lambda e: e._replace(mask=e.mask[:, 0]), ValueError, r"mask must have shape \(B, S, H, W\)"),
        (lambda e: e._replace(mask=e.mask.repeat(1, 2, 1, 1)), ValueError, r"mask must have shape \(2, 1, 33, 41\)"),
        (
            lambda e: e._replace(mask=e.mask.to(torch.complex64)),
            TypeError,
            "mask must have dtype .* uint8, .* got complex64",
        ),
    ],
    "target": [
        (lambda e: e._replace(target=e.target[:, None]), ValueError, r"target must have shape \(B, H, W\)"),
        (lambda e: e._replace(target=e.target[:1]), ValueError, r"target must have shape \(2, 33, 41\)"),
        (lambda e: e._replace(target=e.target.int()), TypeError, "target must have dtype int64, got int32"),
    ],
}


@pytest.mark.parametrize(("change", "error", "message"), [case for cases in BAD.values() for case in cases])
def test_bad_episodes_are_named_before_anything_runs(change, error, message):
    model = small("dpcn")
    model.backbone.register_forward_pre_hook(lambda *_: pytest.fail("something ran"))
    with pytest.raises(error, match=f"DPCN: {message}"):
        model.loss(*change(episode()))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("unet", {}, "build: name must be one of dpcn, dpnet, panet, got 'unet'"),
        ("dpcn", {"backbone": "resnet18"}, "backbone must be a module or one of tiny, .* got 'resnet18'"),
        ("dpcn", {"backbone": 3}, "DPCN: backbone must be a torch.nn.Module, got int"),
        ("dpcn", {"backbone": nn.Conv2d(3, 3, 1)}, "DPCN: backbone.channels must be three int"),
        ("dpcn", {"window": 3}, "build: dpcn has no option 'window'; it has sam, ffm"),
        ("dpcn", {"kernel_size": 4}, r"DPCN: kernel_size must have odd sizes 1 \.\.\. 9, got 4"),
        ("dpcn", {"kernel_size": 11}, r"DPCN: kernel_size must be 1 \.\.\. 9, got 11"),
        ("dpcn", {"kernel_size": 5.0}, "DPCN: kernel_size must be an int, got float"),
        ("dpcn", {"generator_kernel": 2}, r"DPCN: generator_kernel must have odd sizes 1 \.\.\. 9, got 2"),
        ("dpcn", {"kernels": ()}, "DPCN: kernels must hold at least one kernel, got none"),
        ("dpcn", {"kernels": "square"}, "DPCN: kernels must be some of vertical, horizontal, square, got str"),
        ("dpcn", {"kernels": ("v",)}, "DPCN: kernels must be one of vertical, horizontal, square, got 'v'"),
        ("dpcn", {"kernels": ("square", "square")}, "DPCN: kernels must be some of .*, each once, got"),
        ("dpcn", {"sam": 1}, "DPCN: sam must be a bool, got int"),
        ("dpcn", {"frozen_bn": None}, "DPCN: frozen_bn must be a bool, got NoneType"),
        ("dpcn", {"square_from": "sum"}, "DPCN: square_from must be one of ps, fg, got 'sum'"),
        ("dpcn", {"mid_dropout": 1.5}, r"DPCN: mid_dropout must be 0 \.\.\. 1, got 1.5"),
        ("dpcn", {"cls_dropout": "a"}, "DPCN: cls_dropout must be a number, got str"),
        ("dpcn", {"swap_weight": -1}, "DPCN: swap_weight must be finite and >= 0, got -1"),
        ("dpcn", {"channels": 0}, "DPCN: channels must be >= 1, got 0"),
        ("dpcn", {"channels": True}, "DPCN: channels must be an int, got bool"),
        ("dpcn", {"dilations": (0,)}, "DPCN: dilations must be >= 1, got 0"),
        ("dpcn", {"dilations": 3}, "DPCN: dilations must be a sequence of int, got int"),
        ("dpcn", {"trainable_backbone": (5,)}, "DPCN: trainable_backbone must be True, False or stages of 1"),
        ("dpcn", {"trainable_backbone": "layer4"}, "DPCN: trainable_backbone must be True, False or stages of 1"),
        ("dpnet", {"bins": (0.5, 0)}, "DPNet: bins must be positive int or float parts"),
        ("dpnet", {"bins": []}, "DPNet: bins must hold at least one bin, got none"),
        ("dpnet", {"channels": 8.0}, "DPNet: channels must be an int, got float"),
        ("panet", {"stage": 1}, r"PANet: stage must be 2 \.\.\. 4, got 1"),
        ("panet", {"scale": -20}, "PANet: scale must be finite and >= 0, got -20"),
    ],
)
def test_bad_options_are_named(name, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        build(name, **options)


# ---- backbones of one's own -----------------------------------------------------------------------------------------


class Own(nn.Module):
    """Features of different grids; no stages by name."""

    channels = (4, 6, 5)

    def __init__(self, returned: int = 3):
        super().__init__()
        self.returned = returned
        self.convolutions = nn.ModuleList(
            nn.Conv2d(3, c, 3, s, 1) for c, s in zip(self.channels, (4, 8, 16), strict=True)
        )

    def forward(self, images):
        return [c(images) for c in self.convolutions][: self.returned]


@pytest.mark.parametrize("name", MODELS)
def test_own_backbone(name):
    e = episode(shots=2)
    model = small(name, backbone=Own())
    assert all(p.requires_grad for p in model.backbone.parameters())
    assert finite(model, e)
    assert model(*e[:3]).shape == (2, 2, 33, 41)
    frozen = small(name, backbone=Own(), trainable_backbone=False)
    assert not any(p.requires_grad for p in frozen.backbone.parameters())
    with pytest.raises(ValueError, match="trainable_backbone must be True or False for a backbone without"):
        small(name, backbone=Own(), trainable_backbone=(4,))
    with pytest.raises(ValueError, match="backbone must return features of stages"):
        small(name, backbone=Own(2))(*e[:3])
    if name == "dpcn":
        with pytest.raises(ValueError, match="premask_layer4 needs a backbone with stage4"):
            small(name, backbone=Own(), premask_layer4=True)


def test_build_loads_weights(tmp_path):
    source = Tiny(32)
    torch.save(source.state_dict(), tmp_path / "tiny.pt")
    model = build("dpcn", "tiny", weights=tmp_path / "tiny.pt")
    assert isinstance(model, DPCN)
    assert all(torch.equal(a, b) for a, b in zip(model.backbone.parameters(), source.parameters(), strict=True))


def test_import_needs_torch_and_fss_kernels_only():
    code = (
        "import sys, torch, fss_kernels; before = set(sys.modules); import fss_models;"
        "new = {m.partition('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names);"
        "assert new == {'fss_models'}, new"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_docstrings():
    for module in pkgutil.iter_modules(fss_models.__path__):
        results = doctest.testmod(importlib.import_module(f"fss_models.{module.name}"))
        assert results.failed == 0
    assert doctest.testmod(fss_models).failed == 0
