"""What client and model agree on: settings and options go out and come back, and nothing else gets through."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dagan_rt.errors import InputError
from dagan_rt.serving import protocol
from dagan_rt.serving.protocol import Options, Settings

ANY_SETTINGS = st.builds(
    Settings,
    backend=st.sampled_from(("auto", "onnxruntime", "torch-cuda")),
    threads=st.integers(0, 1024),
    sequences=st.integers(1, 4096),
    queue=st.integers(1, 1024),
    batch=st.integers(1, 1024),
    deadline=st.floats(0, 1),
    idle=st.floats(0.1, 86400),
    most_pixels=st.integers(256, 100_000_000),
)


@settings(max_examples=50, deadline=None)
@given(ANY_SETTINGS)
def test_settings_survive_a_configuration(given: Settings) -> None:
    assert Settings.from_parameters(given.to_parameters() | {"bundle_sha256": "ab", "variant": "dagan"}) == given


def test_missing_settings_are_the_defaults() -> None:
    assert Settings.from_parameters({}) == Settings()
    assert Settings.from_parameters({"queue": "3"}) == Settings(queue=3)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"queue": "many"}, "parameter queue must be int, got 'many'"),
        ({"queue": "2.5"}, "parameter queue must be int, got '2.5'"),
        ({"deadline": "soon" * 100}, "parameter deadline must be float, got 'soon"),
        ({"queue": "0"}, "queue must be 1 to 1024, got 0"),
        ({"sequences": "5000"}, "sequences must be 1 to 4096, got 5000"),
        ({"idle": "nan"}, "idle must be 0.1 to 86400, got nan"),
        ({"deadline": "-1"}, "deadline must be 0 to 1, got -1.0"),
        ({"most_pixels": "100000001"}, "most_pixels must be 256 to 100000000"),
    ],
)
def test_wrong_settings_are_named(parameters: dict[str, str], message: str) -> None:
    with pytest.raises(InputError) as error:
        Settings.from_parameters(parameters)
    assert str(error.value).startswith(message) and len(str(error.value)) < 200


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "motion": st.sampled_from(("relative", "absolute")),
            "adapt_scale": st.booleans(),
            "motion_scale": st.floats(0, 4) | st.integers(0, 4),
            "restart": st.booleans(),
            "encoding": st.sampled_from(("", "JPEG", "PNG", "WEBP")),
            "quality": st.integers(1, 95),
        },
    )
)
def test_options_are_what_was_sent_or_the_defaults(parameters: dict[str, Any]) -> None:
    read = Options.read(parameters)
    assert {name: getattr(read, name) for name in parameters} == parameters
    assert all(getattr(read, each.name) == each.default for each in fields(Options) if each.name not in parameters)


ANYTHING = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.integers()))


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.one_of(st.sampled_from(protocol.OPTIONS), st.text()), ANYTHING))
def test_whatever_is_sent_is_read_or_refused_shortly(parameters: dict[str, Any]) -> None:
    try:
        read = Options.read(parameters)
    except InputError as error:
        assert len(str(error)) < 500
    else:
        assert set(parameters) <= set(protocol.OPTIONS) and 1 <= read.quality <= 95


def test_the_names_of_options_are_those_of_the_class() -> None:
    assert tuple(each.name for each in fields(Options)) == protocol.OPTIONS


def test_what_the_server_imports_needs_nothing_of_the_library_s_other_halves() -> None:
    """The server's environment has neither torch nor onnx nor a client."""
    code = "import sys, dagan_rt.serving.model; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert "numpy" in loaded and not loaded & {"torch", "onnx", "tritonclient", "grpc", "scipy", "onnxruntime"}
