"""A cluster that serves requests over the store: a conductor, its instances, and users who come, wait and hang up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from snowskin.engines.conductor.request import Stage
from tests.simulation.conductor import SimConductor
from tests.simulation.instances import SimInstance
from tests.simulation.kernel import Violation
from tests.simulation.storing import CHAIN_BLOCKS, CHAINS

if TYPE_CHECKING:
    from tests.simulation.world import World


class Serving:
    """The roles beside the nodes."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.kernel = world.kernel
        self.network = world.network
        rng = self.kernel.rng
        self.conductor = SimConductor(self)
        self.instances = [
            SimInstance(self, stage, index, rng.choice(world.nodes))
            for stage in Stage
            for index in range(rng.randint(1, 2))
        ]
        self.roles: list[Any] = [self.conductor, self.conductor, *self.instances]
        self._rate = rng.choice((1.0, 4.0, 12.0))
        self._is_over = False
        self.kernel.at(rng.expovariate(self._rate), self._user_comes)

    def instance(self, name: str) -> SimInstance:
        """By its id."""
        (found,) = (each for each in self.instances if each.name == name)
        return found

    def cut_a_watch(self) -> None:
        """The network breaks one of the conductor's streams."""
        self.kernel.rng.choice(self.conductor.watchings).cut()

    def slow_a_watch(self) -> None:
        """The conductor reads one of its streams late."""
        self.kernel.rng.choice(self.conductor.watchings).slow_down()

    def _user_comes(self) -> None:
        if self._is_over:
            return
        rng = self.kernel.rng
        if self.conductor.process.is_alive:
            chain = rng.choice(CHAINS)
            names = [f"{chain}{i}" for i in range(rng.randint(1, CHAIN_BLOCKS))]
            connection = self.conductor.arrive(names, rng.randint(1, 8))
            if not self.world.is_calm and rng.random() < 0.15:
                process = self.conductor.process
                process.at(rng.expovariate(20.0), connection.cancel, is_io=False)
        self.kernel.at(rng.expovariate(self._rate), self._user_comes)

    def stop(self) -> None:
        """Nobody comes any more; instances leave when they have done what they do."""
        self._is_over = True

    def check(self) -> None:
        """After each step."""
        for instance in self.instances:
            if instance.num_running < 0 or instance.num_tokens < 0:
                raise Violation(f"{instance.name} has {instance.num_running} requests")

    def going_on(self) -> list[str]:
        """What is not over yet; when all that users asked for is, the instances are told to go."""
        left = [f"request {each}" for each in self.conductor.running]
        left += [f"work on {each.name}" for each in self.instances if each.num_running]
        if left:
            return left
        for instance in self.instances:
            instance.is_stopping = True
            left += [f"{task.name} of {instance.name}" for task in instance.process.tasks]
        view = self.conductor.view
        for node in self.world.nodes:
            if not view.is_in_sync(node.node_id):
                left.append(f"the view of {node.node_id} is not in sync")
            elif not left and view.blocks(node.node_id) != node.visible_blocks():
                left.append(f"the view of {node.node_id} is not whole")
        return left

    def check_baseline(self) -> None:
        """As if nothing had happened."""
        self.conductor.check_baseline()
        self.conductor.view.check()
        for instance in self.instances:
            if instance.num_running or instance.num_tokens:
                raise Violation(f"{instance.name} still counts {instance.load}")
