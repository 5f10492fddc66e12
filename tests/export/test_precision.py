"""Lower precision in the graph, against NumPy's own rounding and PyTorch in float32."""

from __future__ import annotations

import gc
import tempfile
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
torch = pytest.importorskip("torch")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from dagan_rt.bundle import BatchProfile  # noqa: E402
from dagan_rt.errors import InputError  # noqa: E402
from dagan_rt.export import precision  # noqa: E402
from dagan_rt.export.calibration import record  # noqa: E402
from dagan_rt.export.onnx import trace  # noqa: E402
from dagan_rt.export.passes import transpose_upsampling  # noqa: E402
from dagan_rt.export.subnetworks import TRUNKS, subnetworks  # noqa: E402
from dagan_rt.networks.model import Model  # noqa: E402
from dagan_rt.training.heads import HELD_OUT  # noqa: E402

NAMES = ("source", "driving", "motion", "generator")
VARIANTS = ("dagan", "dagan_spade", "fomm")
DYNAMIC = BatchProfile.parse("1:1:8")
#: What must not be rounded to 8 bits, by a part of the name: first and last convolutions, heads, filters, projections.
FLOAT_IN_INT8 = (
    "/depth/encoder/encoder/conv1/", "/depth/decoder/decoder.10/", "/first/", "/src_first/", "/final/", "/conv_img/",
    "/keypoints/down/", "/down/", "/kp/", "/jacobian/", "/mask/", "/occlusion/", "query_conv/", "key_conv/",
    "/predictor/encoder/down_blocks.0/", "/hourglass/encoder/down_blocks.0/", "mlp_shared", "/compress/",
)  # fmt: skip


def make_model(small_model: Any, variant: str) -> Model:
    """64 pixels, and wide enough that what lies inside a network has more channels than a picture."""
    return small_model(
        variant, 1, depth_width=16, depth_decoder_widths=(16,) * 5, keypoint_width=16, keypoint_max=32, motion_width=16,
        motion_max=32, generator_width=16, generator_max=32, query_width=16, spade_width=16, spade_hidden=16,
    )  # fmt: skip


class Made:
    """A model, its traced graphs, and what they are given on training and on held-out heads."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.declared = {subnetwork.name: subnetwork for subnetwork in subnetworks(model.config)}
        self.traced = {name: trace(model, it, DYNAMIC) for name, it in self.declared.items()}
        self.samples = record(model, tuple(self.declared.values()), "heads", 4)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dagan_rt.training.heads.TRAINING", HELD_OUT)
            self.held_out = record(model, tuple(self.declared.values()), "heads", 4)
        self.lowered: dict[tuple[str, str], Any] = {}

    def lower(self, name: str, to: str) -> Any:
        """A graph in a precision, made once."""
        if (name, to) not in self.lowered:
            self.lowered[name, to] = precision.lower(self.traced[name], to, TRUNKS, self.samples[name])
        return self.lowered[name, to]


@pytest.fixture(scope="module")
def made(small_model: Any) -> Any:
    kept: dict[str, Made] = {}

    def make(variant: str) -> Made:
        if variant not in kept:
            kept[variant] = Made(make_model(small_model, variant))
        return kept[variant]

    return make


def session(model: Any) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def reference(made: Made, name: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Inputs of one graph on a head that nothing was calibrated on, and PyTorch's outputs."""
    inputs = made.held_out[name][-1]
    with torch.inference_mode():
        outputs = made.declared[name].run(made.model, {key: torch.from_numpy(x) for key, x in inputs.items()})
    return inputs, {key: x.numpy() for key, x in outputs.items()}


def psnr(result: np.ndarray, reference: np.ndarray) -> float:
    error = ((result.astype(np.float64) - reference) ** 2).mean()
    return float(10 * np.log10(np.abs(reference).max() ** 2 / max(error, 1e-20)))


def weights(model: Any) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def types(model: Any) -> dict[str, int]:
    """Element type of every tensor, as the operators' definitions imply."""
    graph = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    found = {it.name: it.type.tensor_type.elem_type for it in (*graph.input, *graph.output, *graph.value_info)}
    return found | {tensor.name: tensor.data_type for tensor in graph.initializer}


def convolutions(model: Any) -> list[Any]:
    return [node for node in model.graph.node if node.op_type in ("Conv", "ConvTranspose")]


# ---------------------------------------------------------------------------------------------------------------------
# float16


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", NAMES)
def test_fp16_is_valid_and_near(made: Any, variant: str, name: str) -> None:
    it = made(variant)
    model = it.lower(name, "fp16")
    onnx.checker.check_model(model, full_check=True)
    for tensor in (*model.graph.input, *model.graph.output):
        assert tensor.type.tensor_type.elem_type == TensorProto.FLOAT
    inputs, expected = reference(it, name)
    found = session(model).run(list(expected), inputs)
    for (key, exact), result in zip(expected.items(), found, strict=True):
        assert psnr(result, exact) > 60, key


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", NAMES)
def test_fp16_weights_are_the_rounded_ones_in_the_trunks_and_untouched_elsewhere(
    made: Any, variant: str, name: str
) -> None:
    it = made(variant)
    before, after = weights(it.traced[name]), weights(it.lower(name, "fp16"))
    originals = {node.name: node for node in convolutions(it.traced[name])}
    for node in convolutions(it.lower(name, "fp16")):
        half = node.name.startswith(TRUNKS) and not ("query_conv/" in node.name or "key_conv/" in node.name)
        for now, then in zip(node.input[1:], originals[node.name].input[1:], strict=True):
            expected = before[then].astype(np.float16) if half else before[then]
            assert after[now].dtype == expected.dtype, node.name
            np.testing.assert_array_equal(after[now], expected)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", NAMES)
def test_fp16_geometry_and_heads_stay_float32(made: Any, variant: str, name: str) -> None:
    it = made(variant)
    model = it.lower(name, "fp16")
    found = types(model)
    softened = {node.input[0] for node in it.traced[name].graph.node if node.op_type == "Softmax"}
    logits = {node.name for node in it.traced[name].graph.node if softened.intersection(node.output)}
    for node in model.graph.node:
        exact = (
            not node.name.startswith(TRUNKS)
            or node.op_type in ("Softmax", "Sigmoid", "GridSample", "InstanceNormalization")
            or node.name in logits
        )
        if exact and node.op_type != "Cast":
            used = {key: found[key] for key in (*node.input, *node.output) if key}
            assert TensorProto.FLOAT16 not in used.values(), (node.name, used)


@pytest.mark.parametrize(("name", "expected"), [("source", 8), ("driving", 4), ("motion", 2), ("generator", 3)])
def test_fp16_casts_only_at_the_borders(made: Any, name: str, expected: int) -> None:
    model = made("dagan").lower(name, "fp16")
    casts = [node for node in model.graph.node if node.op_type == "Cast"]
    assert len(casts) == expected
    assert len({node.input[0] for node in casts}) == len(casts)  # no tensor is cast twice
    assert not {node.input[0] for node in casts} & {node.output[0] for node in casts}  # nor there and back


def test_fp16_keeps_the_given_model(made: Any) -> None:
    it = made("dagan")
    before = it.traced["generator"].SerializeToString()
    first = precision.to_fp16(it.traced["generator"], TRUNKS).SerializeToString()
    assert it.traced["generator"].SerializeToString() == before
    assert precision.to_fp16(it.traced["generator"], TRUNKS).SerializeToString() == first


def test_fp16_takes_transposed_convolutions(made: Any) -> None:
    it = made("dagan")
    inputs, expected = reference(it, "generator")
    model = onnx.ModelProto()
    model.CopyFrom(it.traced["generator"])
    assert transpose_upsampling(model) == 2
    for to in ("fp16", "int8"):
        lowered = precision.lower(model, to, TRUNKS, it.samples["generator"])
        onnx.checker.check_model(lowered, full_check=True)
        assert psnr(session(lowered).run(["prediction"], inputs)[0], expected["prediction"]) > 30, to


def toy(weight: float) -> Any:
    """One trunk: a 1 × 1 convolution and a Relu on [1, 1, 2, 2]."""
    tensor = [1, 1, 2, 2]
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["y"], name="/trunk/Conv"),
        helper.make_node("Relu", ["y"], ["z"], name="/trunk/Relu"),
    ]
    graph = helper.make_graph(
        nodes, "toy", [helper.make_tensor_value_info("x", TensorProto.FLOAT, tensor)],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, tensor)],
        [numpy_helper.from_array(np.full((1, 1, 1, 1), weight, np.float32), "w")],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_fp16_refuses_weights_that_it_cannot_hold() -> None:
    with pytest.raises(InputError, match=r"^weight w reaches 7e\+04, float16 ends at 65504: export .* in fp32$"):
        precision.to_fp16(toy(70000.0), ["/trunk/"])
    with pytest.raises(InputError, match="weight w reaches nan"):
        precision.to_fp16(toy(float("nan")), ["/trunk/"])
    assert weights(precision.to_fp16(toy(2e-8), ["/trunk/"]))["w_half"] == 0  # as documented


def test_fp16_overflow_of_an_activation_is_not_hidden() -> None:
    from onnx.reference import ReferenceEvaluator

    model = precision.to_fp16(toy(200.0), ["/trunk/"])
    run = ReferenceEvaluator(model).run
    with np.errstate(over="ignore"):
        assert np.isinf(run(None, {"x": np.full((1, 1, 2, 2), 400.0, np.float32)})[0]).all()
    assert run(None, {"x": np.full((1, 1, 2, 2), 300.0, np.float32)})[0].ravel().tolist() == [60000.0] * 4


@pytest.mark.parametrize("name", NAMES)
def test_a_rounding_twin_holds_every_half_tensor_rounded(made: Any, name: str) -> None:
    """In ONNX Runtime, tensor by tensor: what the graph says is float16 has no more digits than float16."""
    half = made("dagan").lower(name, "fp16")
    twin = precision.rounding_twin(half)
    assert all(tensor.data_type != TensorProto.FLOAT16 for tensor in twin.graph.initializer)
    halves = [it.name for it in half.graph.value_info if it.type.tensor_type.elem_type == TensorProto.FLOAT16]
    assert len(halves) > 5
    shown = type(twin)()
    shown.CopyFrom(twin)
    shown.graph.output.extend(helper.make_tensor_value_info(tensor, TensorProto.FLOAT, None) for tensor in halves)
    session = onnxruntime.InferenceSession(shown.SerializeToString(), providers=["CPUExecutionProvider"])
    sample = made("dagan").held_out[name][0]
    for tensor, values in zip(halves, session.run(halves, sample), strict=True):
        np.testing.assert_array_equal(values, values.astype(np.float16).astype(np.float32), err_msg=tensor)


def test_a_rounding_twin_overflows_in_onnx_runtime() -> None:
    twin = precision.rounding_twin(precision.to_fp16(toy(200.0), ["/trunk/"]))
    session = onnxruntime.InferenceSession(twin.SerializeToString(), providers=["CPUExecutionProvider"])
    assert np.isinf(session.run(None, {"x": np.full((1, 1, 2, 2), 400.0, np.float32)})[0]).all()
    assert session.run(None, {"x": np.full((1, 1, 2, 2), 300.0, np.float32)})[0].ravel().tolist() == [60000.0] * 4


# ---------------------------------------------------------------------------------------------------------------------
# int8


def quantised(model: Any) -> dict[str, tuple[Any, Any]]:
    """Name of an int8 convolution -> its DequantizeLinear nodes, of the activation and of the weight."""
    makers = {output: node for node in model.graph.node for output in node.output}
    found = {}
    for node in convolutions(model):
        pair = [makers.get(key) for key in node.input[:2]]
        if all(maker is not None and maker.op_type == "DequantizeLinear" for maker in pair):
            found[node.name] = (pair[0], pair[1])
    return found


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", NAMES)
def test_int8_convolutions(made: Any, variant: str, name: str) -> None:
    it = made(variant)
    model = it.lower(name, "int8")
    onnx.checker.check_model(model, full_check=True)
    lowered, before, after = quantised(model), weights(it.traced[name]), weights(model)
    for node in convolutions(it.traced[name]):
        left_float = not node.name.startswith(TRUNKS) or any(part in node.name for part in FLOAT_IN_INT8)
        left_float |= variant == "dagan_spade" and node.name in NORMALISED
        border = (name, variant, node.name) in BORDERS
        assert (node.name in lowered) == (not left_float and not border), node.name
        if node.name not in lowered:
            continue
        weight = before[node.input[1]]
        values, scale, zero = (after[key] for key in lowered[node.name][1].input)
        expected = np.abs(weight).reshape(len(weight), -1).max(axis=1) / np.float32(127)
        np.testing.assert_allclose(scale, expected, rtol=1e-6)
        shaped = scale.reshape(-1, *[1] * (weight.ndim - 1))
        assert values.dtype == np.int8 and np.abs(values - np.rint(weight / shaped)).max() <= 1  # ties may differ
        assert np.abs(values * shaped - weight).max() <= 0.5001 * scale.max()
        assert not zero.any() and lowered[node.name][1].attribute[0].i == 0


#: SPADE's convolutions whose results are instance-normalised.
NORMALISED = {
    f"/decoder/{name}/Conv"
    for name in ("fc", "up_0/conv_0", "up_0/conv_1", "up_0/conv_s", "up_1/conv_0")
    + tuple(f"G_middle_{block}/conv_{i}" for block in (0, 1, 2) for i in (0, 1))
}
#: Of one graph: convolutions with none before or none behind them.
BORDERS = {
    ("source", "dagan", "/down_blocks.1/conv/Conv"), ("source", "dagan_spade", "/down_blocks.1/conv/Conv"),
    ("source", "fomm", "/down_blocks.1/conv/Conv"), ("generator", "dagan", "/AttnModule/value_conv/Conv"),
    ("generator", "dagan_spade", "/AttnModule/value_conv/Conv"), ("generator", "fomm", "/bottleneck/r0/conv1/Conv"),
}  # fmt: skip


@pytest.mark.parametrize("name", ["driving", "generator"])
def test_int8_activations_have_the_largest_magnitude_as_range(made: Any, name: str) -> None:
    it = made("dagan")
    model, after = it.lower(name, "int8"), weights(it.lower(name, "int8"))
    makers = {output: node for node in model.graph.node for output in node.output}
    watched = onnx.ModelProto()
    watched.CopyFrom(it.traced[name])
    inner = [node for node in convolutions(watched) if node.name in quantised(model)]
    inputs = sorted({node.input[0] for node in inner})
    watched.graph.output.extend(helper.make_empty_tensor_value_info(key) for key in inputs)
    run = session(watched).run
    largest = np.max([[np.abs(x).max() for x in run(inputs, sample)] for sample in it.samples[name]], axis=0)
    magnitude = dict(zip(inputs, largest, strict=True))
    for node in inner:
        dequantize = quantised(model)[node.name][0]
        assert makers[dequantize.input[0]].op_type == "QuantizeLinear"
        assert after[dequantize.input[2]] == 0 and after[dequantize.input[2]].dtype == np.int8
        np.testing.assert_allclose(after[dequantize.input[1]], magnitude[node.input[0]] / 127, rtol=1e-4)


def test_int8_spends_no_range_on_what_a_relu_cuts_off(made: Any) -> None:
    it = made("dagan")
    model, after = it.lower("generator", "int8"), weights(it.lower("generator", "int8"))
    scales = {node.input[0]: after[node.input[1]] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    inner = {node.output[0] for node in convolutions(it.traced["generator"]) if node.name in quantised(model)}
    pairs = [
        (node.input[0], node.output[0])
        for node in it.traced["generator"].graph.node
        if node.op_type == "Relu" and node.input[0] in inner
    ]
    assert pairs
    for before, behind in pairs:
        assert scales[before] == scales[behind]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", NAMES)
def test_int8_is_near(made: Any, variant: str, name: str) -> None:
    it = made(variant)
    inputs, expected = reference(it, name)
    found = session(it.lower(name, "int8")).run(list(expected), inputs)
    for (key, exact), result in zip(expected.items(), found, strict=True):
        assert psnr(result, exact) > 30, key


def test_int8_works_at_a_fixed_batch_and_leaves_nothing_behind(
    made: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = made("fomm")
    traced = trace(it.model, it.declared["generator"], BatchProfile.parse("3"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    samples = it.samples["generator"]
    model = precision.to_int8(traced, TRUNKS, iter(samples))
    assert not list(tmp_path.iterdir())
    assert precision.to_int8(traced, TRUNKS, samples).SerializeToString() == model.SerializeToString()
    expected = weights(it.lower("generator", "int8"))
    for key, value in weights(model).items():
        if key in expected and value.dtype != np.int64:  # all but shapes
            np.testing.assert_allclose(value, expected[key], rtol=1e-4, err_msg=key)
    three = {key: np.concatenate([sample[key] for sample in samples[:3]]) for key in samples[0]}
    assert session(model).run(None, three)[0].shape == (3, 3, 64, 64)


def test_int8_holds_one_sample_at_a_time(made: Any) -> None:
    it = made("fomm")
    given: list[weakref.ref[np.ndarray]] = []

    def samples() -> Iterator[dict[str, np.ndarray]]:
        for _ in range(6):
            sample = {key: x.copy() for key, x in it.samples["generator"][0].items()}
            given.extend(weakref.ref(x) for x in sample.values())
            gc.collect()
            assert sum(x() is not None for x in given) <= 2 * len(sample)  # and the one before
            yield sample

    precision.to_int8(it.traced["generator"], TRUNKS, samples())


def test_int8_without_an_inner_convolution_is_the_graph_itself() -> None:
    model = precision.to_int8(toy(1.0), ["/trunk/"], [{"x": np.ones((1, 1, 2, 2), np.float32)}])
    assert [node.op_type for node in model.graph.node] == ["Conv", "Relu"]


def test_lower_says_what_is_wrong() -> None:
    model = toy(1.0)
    assert precision.lower(model, "fp32", []) is model
    with pytest.raises(InputError, match="^int8 needs calibration data .* or heads for synthetic ones$"):
        precision.lower(model, "int8", [])
    with pytest.raises(InputError, match="^precision must be one of fp32, fp16, int8, got 'int4'$"):
        precision.lower(model, "int4", [])
    with pytest.raises(InputError, match="^int8 was given no calibration samples"):
        precision.lower(made_conv_chain(), "int8", ["/trunk/"], [])


def made_conv_chain() -> Any:
    """Three 3-channel-in convolutions in a row, the middle one 16 to 16."""
    shapes = {"a": (16, 3, 1, 1), "b": (16, 16, 1, 1), "c": (3, 16, 1, 1)}
    nodes = [
        helper.make_node("Conv", [x, weight], [y], name=f"/trunk/{weight}/Conv")
        for x, weight, y in (("x", "a", "p"), ("p", "b", "q"), ("q", "c", "z"))
    ]
    tensor = [1, 3, 4, 4]
    graph = helper.make_graph(
        nodes, "chain", [helper.make_tensor_value_info("x", TensorProto.FLOAT, tensor)],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, tensor)],
        [numpy_helper.from_array(np.ones(shape, np.float32), name) for name, shape in shapes.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
