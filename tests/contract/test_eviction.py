"""The laws of `EvictionPolicy`, on every policy of the registry, and LRU's order by a model."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import pytest
from hypothesis import given
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from snowskin.kvstore.errors import BadSetting
from snowskin.kvstore.eviction.api import EvictionPolicy
from snowskin.kvstore.eviction.lru import LruEviction
from snowskin.kvstore.eviction.registry import EVICTION_POLICIES, make_eviction

Policy = EvictionPolicy[int]


@pytest.fixture(params=sorted(EVICTION_POLICIES))
def policy(request: pytest.FixtureRequest) -> Policy:
    made: Policy = make_eviction(request.param)
    return made


def chain(policy: Policy, *keys: int) -> None:
    for parent, key in itertools.pairwise((None, *keys)):
        assert key is not None
        policy.on_insert(key, parent)


def evict_all(policy: Policy) -> list[int]:
    offered = []
    for key in policy.victims():
        offered.append(key)
        policy.on_remove(key)
    return offered


def test_only_leaves_are_offered_and_parents_follow_within_one_iteration(policy: Policy) -> None:
    chain(policy, 1, 2, 3)
    assert list(policy.victims()) == [3]
    assert evict_all(policy) == [3, 2, 1]
    assert len(policy) == 0


def test_skipped_victim_keeps_its_ancestors_and_comes_again_next_time(policy: Policy) -> None:
    chain(policy, 1, 2, 3)
    policy.on_insert(4, 2)
    offered = []
    for key in policy.victims():
        offered.append(key)
        if key != 3:
            policy.on_remove(key)
    assert offered == [3, 4]
    assert evict_all(policy) == [3, 2, 1]


def test_abandoned_iteration_loses_no_block(policy: Policy) -> None:
    chain(policy, 1, 2)
    policy.on_insert(10, None)
    for _ in policy.victims():
        break
    assert set(evict_all(policy)) == {1, 2, 10}


def test_block_that_becomes_a_leaf_again_is_offered_once(policy: Policy) -> None:
    chain(policy, 1, 2)
    policy.on_remove(2)
    assert list(policy.victims()) == [1]
    offered = []
    for key in policy.victims():
        offered.append(key)
        policy.on_insert(len(offered) + 1, 1)
        policy.on_remove(len(offered) + 1)
    assert offered == [1]


def test_parent_that_comes_later_is_no_leaf(policy: Policy) -> None:
    policy.on_insert(2, 1)
    policy.on_insert(1, None)
    assert list(policy.victims()) == [2]


def test_parent_removed_by_force_leaves_its_child_evictable(policy: Policy) -> None:
    chain(policy, 1, 2, 3)
    policy.on_remove(2)
    assert set(policy.victims()) == {1, 3}
    policy.on_insert(2, 1)
    assert evict_all(policy) == [3, 2, 1]


def test_children_are_counted_while_they_are_resident(policy: Policy) -> None:
    policy.on_insert(2, 1)
    policy.on_insert(3, 1)
    assert (policy.num_children(1), policy.num_children(2)) == (2, 0)
    policy.on_remove(2)
    assert policy.num_children(1) == 1
    policy.on_remove(3)
    assert policy.num_children(1) == 0


def test_touch_of_a_block_that_is_not_resident_does_not_make_it_so(policy: Policy) -> None:
    policy.on_insert(1, None)
    policy.on_touch([1, 2, 3])
    assert evict_all(policy) == [1]


def test_wrong_inserts_and_removals_are_refused(policy: Policy) -> None:
    policy.on_insert(1, None)
    with pytest.raises(ValueError, match="resident already"):
        policy.on_insert(1, None)
    with pytest.raises(ValueError, match="own parent"):
        policy.on_insert(2, 2)
    with pytest.raises(KeyError):
        policy.on_remove(3)
    assert evict_all(policy) == [1]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=40))
def test_every_resident_block_is_offered_once(edges: list[tuple[int, int]]) -> None:
    for name in EVICTION_POLICIES:
        policy: Policy = make_eviction(name)
        resident = set()
        for key, parent in edges:
            if (
                key not in resident and parent != key
            ):  # circles too, though no hash can name its descendant
                policy.on_insert(key, parent)
                resident.add(key)
        offered = evict_all(policy)
        assert sorted(offered) == sorted(resident)
        assert len(policy) == 0


def test_parents_in_a_circle_keep_nobody(policy: Policy) -> None:
    policy.on_insert(1, 3)
    policy.on_insert(2, 1)
    policy.on_insert(3, 2)
    assert evict_all(policy) == [2, 1, 3]
    policy.on_insert(1, 2)
    policy.on_insert(2, 1)
    policy.on_insert(4, 2)
    assert sorted(evict_all(policy)) == [1, 2, 4]


def test_what_was_removed_and_restored_leaves_in_the_order_of_before(policy: Policy) -> None:
    for key in (10, 20, 30):
        chain(policy, key, key + 1, key + 2)
    policy.on_touch([20, 21])
    expected = evict_all_and_restore(policy)
    assert evict_all_and_restore(policy) == expected
    policy.on_insert(40, None)
    assert evict_all(policy) == [*expected, 40]


def evict_all_and_restore(policy: Policy) -> list[int]:
    removed = [(key, policy.on_remove(key)) for key in policy.victims()]
    for key, standing in reversed(removed):
        policy.on_restore(key, standing)
    return [key for key, _ in removed]


def test_unknown_policy_lists_the_known_ones() -> None:
    with pytest.raises(BadSetting, match="lru"):
        make_eviction("clock-pro")


def test_lru_takes_the_least_recently_used_leaf() -> None:
    policy: LruEviction[int] = LruEviction()
    chain(policy, 1, 2)
    chain(policy, 11, 12)
    policy.on_touch([1, 2])
    assert evict_all(policy) == [12, 11, 2, 1]


def test_lru_takes_the_later_of_two_blocks_of_one_run() -> None:
    policy: LruEviction[int] = LruEviction()
    for key in (1, 2, 3):
        policy.on_insert(key, None)
    policy.on_touch([2, 3, 1])
    assert evict_all(policy) == [1, 3, 2]


def test_lru_forgets_what_left_without_ever_being_offered() -> None:
    policy: LruEviction[int] = LruEviction()
    policy.on_insert(-1, None)
    for key in range(10_000):
        policy.on_insert(key, None)
        policy.on_remove(key)
    assert len(policy._heap) < 3_000
    assert evict_all(policy) == [-1]


def test_lru_that_compacts_within_an_iteration_offers_no_block_twice() -> None:
    policy: LruEviction[int] = LruEviction()
    policy.on_insert(1, None)
    offered = []
    for key in policy.victims():
        offered.append(key)
        policy._compact()
        policy.on_insert(2, 1)
        policy.on_remove(2)
    assert offered == [1]


class LruMachine(RuleBasedStateMachine):
    """LRU against ten lines: stamps in a dict, and a search through all of it for each victim."""

    def __init__(self) -> None:
        super().__init__()
        self.policy: LruEviction[int] = LruEviction()
        self.model: dict[int, tuple[int, int | None]] = {}  # key -> (stamp, parent)
        self.clock = 0

    def model_victims(self, skipped: set[int]) -> int | None:
        parents = {parent for _, parent in self.model.values()}
        leaves = [(stamp, key) for key, (stamp, _) in self.model.items() if key not in parents]
        return min((leaf for leaf in leaves if leaf[1] not in skipped), default=(0, None))[1]

    @rule(key=st.integers(0, 12), parent=st.one_of(st.none(), st.integers(0, 12)))
    def insert(self, key: int, parent: int | None) -> None:
        if key in self.model or parent == key:
            return
        above = parent
        while above in self.model:
            above = self.model[above][1]
            if above == key:  # a circle: then it is a start
                parent = None
                break
        self.clock += 1
        self.model[key] = (self.clock, parent)
        self.policy.on_insert(key, parent)

    @rule(keys=st.lists(st.integers(0, 12), max_size=6, unique=True))
    def touch(self, keys: list[int]) -> None:
        self.clock += len(keys)
        for position, key in enumerate(keys):
            if key in self.model:
                self.model[key] = (self.clock - position, self.model[key][1])
        self.policy.on_touch(keys)

    @rule(key=st.integers(0, 12))
    def remove(self, key: int) -> None:
        if self.model.pop(key, None) is not None:
            self.policy.on_remove(key)

    @rule(decisions=st.lists(st.sampled_from(["evict", "skip", "evict and another"]), max_size=8))
    def evict(self, decisions: list[str]) -> None:
        skipped: set[int] = set()
        victims = self.policy.victims()
        for decision in decisions:
            expected = self.model_victims(skipped)
            assert next(victims, None) == expected
            if expected is None:
                break
            if decision == "skip":
                skipped.add(expected)
                continue
            self.policy.on_remove(expected)
            del self.model[expected]
            if decision == "evict and another" and self.model:
                other = next(iter(self.model))
                self.policy.on_remove(other)
                del self.model[other]
        victims.close()  # type: ignore[attr-defined]

    @rule(decisions=st.lists(st.booleans(), max_size=8))
    def evict_in_vain(self, decisions: list[bool]) -> None:
        removed = []
        victims = self.policy.victims()
        for decision, key in zip(decisions, victims, strict=False):
            if decision:
                removed.append((key, self.policy.on_remove(key)))
        victims.close()  # type: ignore[attr-defined]
        for key, standing in reversed(removed):
            self.policy.on_restore(key, standing)

    @rule()
    def compact(self) -> None:
        self.policy._compact()

    @invariant()
    def same_size(self) -> None:
        assert len(self.policy) == len(self.model)


TestLruMachine = LruMachine.TestCase
