"""What is read of a function before it runs: kind, parameters, whether anything comes back (SEMANTICS T1, T4, T5)."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import pytest

from obsdag.tasks.signature import Signature, call_kind, read_signature, returns_only_none

flag = False


def effect(*args: Any) -> None: ...


def nothing(ctx: Any) -> None:
    effect(ctx)


async def async_nothing(ctx: Any) -> None:
    effect(ctx)


async def async_with_awaits(ctx: Any) -> None:
    async with contextlib.AsyncExitStack():
        await async_nothing(ctx)


def stub(ctx: Any) -> Any: ...


def explicit(ctx: Any) -> None:
    if flag:
        return None
    effect()
    return


def many_ways(ctx: Any) -> None:
    try:
        with contextlib.suppress(KeyError):
            for _ in ctx:
                if flag:
                    return
    except ValueError:
        return None
    finally:
        effect()


def raises_or_nothing(ctx: Any) -> None:
    if flag:
        raise ValueError(ctx)


def inner_returns_something(ctx: Any) -> None:
    def inner() -> Any:
        return ctx

    inner()


class Holder:
    def __call__(self, ctx: Any) -> None:
        effect(ctx)

    def method(self, ctx: Any) -> None:
        effect(ctx)

    async def async_method(self, ctx: Any) -> None:
        effect(ctx)

    @staticmethod
    def static(ctx: Any) -> None:
        effect(ctx)

    @classmethod
    def of_class(cls, ctx: Any) -> None:
        effect(ctx)


class AsyncHolder:
    async def __call__(self, ctx: Any) -> None:
        effect(ctx)


class StaticCall:
    @staticmethod
    def __call__(ctx: Any) -> None:
        effect(ctx)


NOTHING_COMES_BACK: list[Callable[..., Any]] = [
    nothing,
    async_nothing,
    async_with_awaits,
    stub,
    explicit,
    many_ways,
    raises_or_nothing,
    inner_returns_something,
    lambda ctx: None,
    functools.partial(nothing),
    functools.partial(functools.partial(async_nothing), 1),
    functools.partial(Holder().method),
    Holder(),
    Holder().method,
    Holder().async_method,
    Holder.static,
    Holder.of_class,
    AsyncHolder(),
    StaticCall(),
    staticmethod(nothing),
]


@pytest.mark.parametrize("func", NOTHING_COMES_BACK)
def test_T4_nothing_ever_comes_back(func: Any) -> None:
    assert returns_only_none(func)


def one_of_two(ctx: Any) -> Any:
    if flag:
        return ctx
    return None


def falls_off(ctx: Any) -> Any:
    if flag:
        return ctx


def only_raises(ctx: Any) -> Any:
    raise NotImplementedError


def for_ever(ctx: Any) -> Any:
    while True:
        effect()


async def only_raises_async(ctx: Any) -> Any:
    await async_nothing(ctx)
    raise NotImplementedError


def or_none(ctx: Any) -> Any:
    return ctx or None


def if_else_none(ctx: Any) -> Any:
    return ctx if flag else None


def none_and(ctx: Any) -> Any:
    return flag and None


def in_finally(ctx: Any) -> Any:
    try:
        return ctx
    finally:
        effect()


def in_with(ctx: Any) -> Any:
    with contextlib.suppress(ValueError):
        return ctx
    return None


def empty_list(ctx: Any) -> Any:
    return []


def false(ctx: Any) -> Any:
    return False


def zero(ctx: Any) -> Any:
    return 0


def local(ctx: Any) -> Any:
    nothing_yet = None
    return nothing_yet


def call(ctx: Any) -> Any:
    return effect(ctx)  # type: ignore[func-returns-value]


def matched(ctx: Any) -> Any:
    match ctx:
        case 1:
            return None
        case _:
            return ctx


def plain_generator(ctx: Any) -> Any:
    yield None


async def async_generator(ctx: Any) -> Any:
    yield None


@functools.wraps(nothing)
def wrapper(*args: Any) -> Any:
    return nothing(*args) or args


@functools.cache
def cached(ctx: Any) -> None:
    effect(ctx)


SOMETHING_MAY_COME_BACK: list[Callable[..., Any]] = [
    one_of_two,
    falls_off,
    only_raises,
    for_ever,
    only_raises_async,
    or_none,
    if_else_none,
    none_and,
    in_finally,
    in_with,
    empty_list,
    false,
    zero,
    local,
    call,
    matched,
    plain_generator,
    async_generator,
    wrapper,
    cached,
    print,
    Holder,
    dict.get,
    lambda ctx: effect(ctx, 1),
    functools.partial(print),
]


@pytest.mark.parametrize("func", SOMETHING_MAY_COME_BACK)
def test_T4_something_may_come_back_or_it_cannot_be_told(func: Any) -> None:
    assert not returns_only_none(func)


@pytest.mark.parametrize(
    ("func", "kind"),
    [
        (nothing, "function"),
        (async_nothing, "coroutine"),
        (plain_generator, "generator"),
        (async_generator, "asyncgen"),
        (functools.partial(async_nothing), "coroutine"),
        (functools.partial(async_generator), "asyncgen"),
        (Holder(), "function"),
        (AsyncHolder(), "coroutine"),
        (functools.partial(AsyncHolder()), "coroutine"),
        (Holder().async_method, "coroutine"),
        (Holder.static, "function"),
        (staticmethod(async_nothing), "coroutine"),
        (AsyncHolder, "function"),
        (print, "function"),
        (cached, "function"),
    ],
)
def test_T5_what_a_call_gives(func: Any, kind: str) -> None:
    assert call_kind(func) == kind


def decorated(func: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(func)
    def around(*args: Any, **kwargs: Any) -> Any:
        return func(*args, **kwargs)

    return around


def injected(func: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(func)
    def around(ctx: Any) -> Any:
        return func(ctx, "database")

    return around


def test_T5_the_outermost_function_decides_the_kind() -> None:
    assert call_kind(decorated(async_nothing)) == "function"
    assert call_kind(decorated(plain_generator)) == "function"


def only_context(ctx: Any) -> Any:
    return ctx


def with_env(ctx: Any, anything: Any) -> Any:
    return ctx


def optional_env(ctx: Any, env: Any = None) -> Any:
    return ctx


def own_default(ctx: Any, retries: int = 3) -> Any:
    return ctx


def own_keyword(ctx: Any, *, retries: int = 3) -> Any:
    return ctx


def variadic(*args: Any) -> Any:
    return args


def with_resource(ctx: Any, resource: Any) -> Any:
    return ctx


def with_both(ctx: Any, env: Any, *, resource: Any = None) -> Any:
    return ctx


def with_three(ctx: Any, env: Any, third: Any = 1) -> Any:
    return ctx


class Bound:
    def method(self, ctx: Any, env: Any) -> Any:
        return ctx


@pytest.mark.parametrize(
    ("func", "takes_env", "takes_resource", "needs_resource"),
    [
        (only_context, False, False, False),
        (with_env, True, False, False),
        (optional_env, True, False, False),
        (own_default, False, False, False),
        (own_keyword, False, False, False),
        (variadic, False, False, False),
        (with_resource, False, True, True),
        (with_both, True, True, False),
        (with_three, True, False, False),
        (Bound().method, True, False, False),
        (functools.partial(with_three, third=3), True, False, False),
        (functools.partial(with_env, anything=3), False, False, False),
        (decorated(only_context), False, False, False),
        (decorated(with_env), True, False, False),
        (injected(with_env), False, False, False),
        (print, False, False, False),
        (dict, False, False, False),
    ],
)
def test_T1_what_a_function_is_called_with(
    func: Any, takes_env: bool, takes_resource: bool, needs_resource: bool
) -> None:
    assert read_signature(func) == Signature(call_kind(func), takes_env, takes_resource, needs_resource)


def test_T15_a_join_takes_parent_children_and_env() -> None:
    given = ("the parent", "its children")
    assert not read_signature(lambda parent, children: 0, given).takes_env
    assert read_signature(lambda parent, children, env: 0, given).takes_env
    assert read_signature(lambda parent: 0, given).problems == (
        "its function takes 1 positional parameter, but is called with the parent and its children",
    )


def no_parameters() -> Any:
    return 0


def too_many(ctx: Any, env: Any, third: Any) -> Any:
    return ctx


def keyword_only(ctx: Any, *, url: str) -> Any:
    return ctx


def resource_first(resource: Any, ctx: Any) -> Any:
    return ctx


def resource_positional(ctx: Any, resource: Any, /) -> Any:
    return ctx


@pytest.mark.parametrize(
    ("func", "problem"),
    [
        (no_parameters, "its function takes no positional parameters, but is called with the context"),
        (too_many, "its function needs 3 positional parameters, but gets the context and at most the environment"),
        (keyword_only, "its function needs the keyword 'url', which nobody gives; bind it with functools.partial"),
        (resource_first, "its parameter 'resource' must come after the others"),
        (resource_positional, "its parameter 'resource' is positional-only"),
        (functools.partial(only_context, ctx=1), "takes no positional parameters"),
        (decorated(no_parameters), "takes no positional parameters"),
    ],
)
def test_T1_parameters_that_the_engine_cannot_give(func: Any, problem: str) -> None:
    [found] = read_signature(func).problems
    assert problem in found
