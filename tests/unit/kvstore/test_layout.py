"""Layouts: sizes, strides, and namespaces that never run together."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import assume, given

from snowskin.kvstore.errors import BadSetting
from snowskin.kvstore.layout import DTYPE_NBYTES, Layout

DEMO = Layout(
    model="demo",
    weights_revision="00ff",
    dtype="float32",
    block_size=16,
    num_layers=12,
    num_kv_heads=4,
    head_dim=64,
)

texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=6)
layouts = st.builds(
    Layout,
    model=texts,
    weights_revision=st.text("0123456789abcdef", min_size=1, max_size=4),
    dtype=st.sampled_from(sorted(DTYPE_NBYTES)),
    byte_order=st.sampled_from(["little", "big"]),
    block_size=st.integers(1, 40),
    first_layer=st.integers(0, 3),
    num_layers=st.integers(1, 40),
    first_kv_head=st.integers(0, 3),
    num_kv_heads=st.integers(1, 40),
    head_dim=st.integers(1, 300),
)


def test_block_of_the_demo_model_has_its_size_and_strides() -> None:
    assert DEMO.block_shape == (12, 2, 4, 16, 64)
    assert DEMO.block_nbytes == 12 * 2 * 4 * 16 * 64 * 4 == 393_216
    assert DEMO.block_strides == np.empty(DEMO.block_shape, dtype=np.float32).strides
    assert (DEMO.layer_nbytes, DEMO.row_nbytes) == (32_768, 256)


def test_mla_block_has_one_latent_row_a_token() -> None:
    mla = replace(DEMO, attention="mla", order="BLTD", num_kv_heads=1, head_dim=576)
    assert mla.block_nbytes == 12 * 16 * 576 * 4
    assert mla.namespace != DEMO.namespace


def test_namespace_is_stable() -> None:
    # A change here makes every stored block unreachable: it needs another domain tag.
    expected = "1bd0a72ce46feac6da7eb550fad07d3231527a2f8d5228449f9dfdfb0d7ec675"
    assert DEMO.namespace.hex() == expected


@given(layouts, layouts)
def test_two_layouts_never_have_one_encoding(one: Layout, other: Layout) -> None:
    assume(one != other)
    assert one.encoding != other.encoding
    assert one.namespace != other.namespace


@given(layouts)
def test_every_field_is_part_of_the_namespace(layout: Layout) -> None:
    for field in fields(Layout):
        value = getattr(layout, field.name)
        if isinstance(value, int):
            other: Any = value + 1
        elif field.name == "weights_revision":
            other = value + "0"
        elif field.name == "model":
            other = value + "x"
        elif field.name == "dtype":
            other = "int8" if value != "int8" else "uint8"
        elif field.name == "byte_order":
            other = "big" if value == "little" else "little"
        else:
            continue  # attention, order and codec have one value each beside gqa
        assert replace(layout, **{field.name: other}).namespace != layout.namespace


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"dtype": "float31"}, "float31"),
        ({"weights_revision": "XYZ"}, "hex"),
        ({"weights_revision": ""}, "revision"),
        ({"block_size": 0}, "block_size"),
        ({"first_layer": -1}, "first_layer"),
        ({"codec": "zstd"}, "raw"),
        ({"attention": "mla"}, "BLTD"),
        ({"attention": "mla", "order": "BLTD"}, "one latent row"),
    ],
)
def test_layout_that_cannot_be_is_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(BadSetting, match=named):
        replace(DEMO, **change)
