"""Trees of contexts (C1, C3, C8, C11) against plain records, in whatever order they are made, changed and destroyed."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from obsdag import Context, Runtime

KEYS = st.sampled_from(["a", "b", "c"])


@dataclass(eq=False)
class Known:
    """What is to be found in a context."""

    parent: Known | None
    data: dict[str, Any]
    name: str = ""
    children: list[Known] = field(default_factory=list)
    is_destroyed: bool = False
    is_frozen: bool = False

    def way_up(self) -> list[Known]:
        return [self, *(self.parent.way_up() if self.parent is not None else [])]


class Trees(RuleBasedStateMachine):
    """Contexts outside of runs: what a run does to them is the simulation's."""

    @initialize(data=st.dictionaries(KEYS, st.integers()))
    def begin(self, data: dict[str, Any]) -> None:
        self.runtime = Runtime()
        self.pairs: list[tuple[Context, Known]] = [(Context(self.runtime, data), Known(None, dict(data)))]

    def of(self, known: Known) -> Context:
        return next(context for context, other in self.pairs if other is known)

    @rule(which=st.randoms(), num=st.sampled_from([None, 0, 1, 3]), named=st.booleans())
    def make_children(self, which: Any, num: int | None, named: bool) -> None:
        context, known = which.choice(self.pairs)
        names = [f"n{len(self.pairs) + i}" if named else "" for i in range(num or 1)]
        made = context.create_child(num, names if num and named else names[0] or None)
        for child, name in zip(made if num else [made], names, strict=True):
            below = Known(known, {}, name)
            known.children.append(below)
            self.pairs.append((child, below))

    @rule(which=st.randoms(), copies=st.booleans(), deeply=st.booleans(), named=st.booleans())
    def make_another(self, which: Any, copies: bool, deeply: bool, named: bool) -> None:
        context, known = which.choice(self.pairs)
        name = f"n{len(self.pairs)}" if named else ""
        other = context.create(copies, deeply, name)
        data = copy.deepcopy(known.data) if deeply else dict(known.data) if copies else {}
        self.pairs.append((other, Known(None, data, name)))

    @rule(which=st.randoms(), key=KEYS, value=st.integers())
    def set_an_item(self, which: Any, key: str, value: int) -> None:
        context, known = which.choice(self.pairs)
        context[key] = known.data[key] = value

    @rule(which=st.randoms(), key=KEYS)
    def add_to_a_list(self, which: Any, key: str) -> None:
        """Each side has lists of its own, so that what should be a copy, and is none, shows."""
        context, known = which.choice(self.pairs)
        if not isinstance(known.data.get(key), list):
            context.pop(key, None)
            known.data[key] = []
        context.setdefault(key, []).append(len(self.pairs))
        known.data[key].append(len(self.pairs))

    @rule(which=st.randoms(), key=KEYS)
    def remove_an_item(self, which: Any, key: str) -> None:
        context, known = which.choice(self.pairs)
        assert context.pop(key, None) == known.data.pop(key, None)

    @rule(which=st.randoms(), freeze=st.booleans())
    def freeze_or_thaw(self, which: Any, freeze: bool) -> None:
        context, known = which.choice(self.pairs)
        known.is_frozen = freeze
        if freeze:
            context.freeze()
        else:
            context.thaw()

    @rule(which=st.randoms())
    def destroy(self, which: Any) -> None:
        context, known = which.choice(self.pairs)
        context.destroy()
        known.is_destroyed = True

    @invariant()
    def is_as_known(self) -> None:
        for context, known in getattr(self, "pairs", ()):
            way_up = known.way_up()
            assert context.to_dict() == known.data
            assert (len(context), sorted(context)) == (len(known.data), sorted(known.data))
            assert context.parent is (None if known.parent is None else self.of(known.parent))
            assert context.children == [self.of(child) for child in known.children]
            assert context.root is self.of(way_up[-1])
            assert context.depth == len(way_up) - 1
            assert context.name == known.name
            assert context.id == known.name or not known.name
            assert context.frozen is known.is_frozen
            assert (context.outcome, context.destroyed) == (
                "dropped" if known.is_destroyed else None,
                known.is_destroyed,
            )

    @invariant()
    def has_an_id_of_its_own(self) -> None:
        ids = [context.id for context, _ in getattr(self, "pairs", ())]
        assert len(ids) == len(set(ids))


Trees.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestTrees = Trees.TestCase
