"""Data comes back exactly, or is refused with its key and type."""

from __future__ import annotations

import datetime
import decimal
import math
import uuid
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from obsdag import EncodingError, JournalError
from obsdag.journal.codec import Codec, mask_of, pack_mask

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(alphabet=st.characters(codec=None))
    | st.binary()
    | st.dates()
    | st.times()
    | st.datetimes()
    | st.timedeltas()
    | st.uuids()
    | st.decimals(allow_nan=False)
    | st.complex_numbers(allow_nan=False)
)
HASHABLE = SCALARS | st.tuples(SCALARS, SCALARS)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
        | st.sets(HASHABLE, max_size=3)
        | st.frozensets(HASHABLE, max_size=3)
        | st.dictionaries(HASHABLE, inner, max_size=3)
    ),
    max_leaves=12,
)


def kinds(value: Any) -> Any:
    """The types of a value and of all that is in it."""
    if isinstance(value, dict):
        return dict, [(kinds(key), kinds(each)) for key, each in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [kinds(each) for each in value]
    return type(value)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.text() | HASHABLE, VALUES, max_size=5))
def test_data_comes_back_with_its_types(data: dict[Any, Any]) -> None:
    codec = Codec()

    found = codec.decode(codec.encode(data))

    assert found == data
    assert kinds(found) == kinds(data)


def test_what_is_not_equal_to_itself_comes_back_too() -> None:
    found = Codec().decode(Codec().encode({"x": math.nan, "y": (1, decimal.Decimal("NaN"))}))

    assert math.isnan(found["x"])
    assert type(found["y"]) is tuple
    assert found["y"][1].is_nan()


def test_a_moment_with_a_zone_stays_the_same_moment() -> None:
    zone = datetime.timezone(datetime.timedelta(hours=5))
    moment = datetime.datetime(2026, 11, 25, 12, 30, tzinfo=zone)

    assert Codec().decode(Codec().encode({"at": moment}))["at"] == moment
    beside_a_tuple = Codec().decode(Codec().encode({"at": moment, "t": ()}))["at"]
    assert beside_a_tuple == moment
    assert beside_a_tuple.utcoffset() == moment.utcoffset()


class Order:
    """Something that only a program knows."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Order)

    __hash__ = object.__hash__


def test_what_has_no_form_is_refused_by_key_and_type() -> None:
    with pytest.raises(
        EncodingError, match=r"key 'order' holds a \S*Order, which the journal cannot encode; keep plain"
    ):
        Codec().encode({"id": 7, "order": [Order()]})


def test_pickle_is_for_those_who_allow_it() -> None:
    encoded = Codec(allow_pickle=True).encode({"order": Order(), "id": uuid.UUID(int=7)})

    assert Codec(allow_pickle=True).decode(encoded) == {"order": Order(), "id": uuid.UUID(int=7)}
    with pytest.raises(JournalError, match="allow_pickle=True"):
        Codec().decode(encoded)
    with pytest.raises(
        EncodingError, match="key 'f' holds a function, which the journal cannot encode: it cannot be pickl"
    ):
        Codec(allow_pickle=True).encode({"f": lambda: 0})


def test_nesting_without_end_is_refused() -> None:
    data: dict[str, Any] = {}
    data["self"] = data

    with pytest.raises(EncodingError, match="key 'self' holds a value"):
        Codec().encode(data)


@given(st.integers(min_value=0, max_value=1 << 10_000))
def test_masks_of_any_length(mask: int) -> None:
    assert mask_of(pack_mask(mask)) == mask
