"""Who freezes, kills, spoils and cuts, from the run's own chance.

Rules kept here: it does to processes what signals can do to them, and to the network what a network does by itself;
bytes are spoilt only where no lease promises them, and only in runs in which everybody verifies.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.simulation.kernel import Process
    from tests.simulation.world import World

THAW_S = (0.03, 0.2, 0.6, 1.2)  # some within every lease, some beyond


class Nemesis:
    """Trouble, at random moments."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._kernel = world.kernel
        rng = self._kernel.rng
        self._every_s = rng.choice((0.05, 0.2, 1.0))
        self._is_over = False
        self._frozen: list[Any] = []
        self._dead: list[Any] = []
        self._storm = 0.0
        acts = [self._freeze_client, self._kill_client, self._freeze_node, self._kill_node]
        acts += [self._storm_begins, self._cut_a_client_off]
        if world.serving is not None:
            acts += [self._freeze_role, self._kill_role, world.serving.cut_a_watch]
            acts += [self._freeze_role, world.serving.slow_a_watch]
        # Not every trouble in every run: what is always interrupted comes to nothing.
        self._acts = rng.sample(acts, rng.randint(1, len(acts)))
        self._copy_probability = rng.choice((0.0, 0.0, 0.01, 0.05))
        if not world.is_calm:
            self._kernel.on_copy = self._on_copy
            if world.spoils:
                self._kernel.at(0.2, self._spoil)
            self._kernel.at(rng.expovariate(1 / self._every_s), self._strike)

    def end(self) -> None:
        """No more trouble; all that is stopped goes on, all that is dead is started."""
        self._is_over = True
        self._world.network.weather.loss_probability = 0.0
        for thing in self._frozen:
            thing.thaw()
        for thing in self._dead:
            if not thing.process.is_alive:
                thing.start()
        self._frozen, self._dead = [], []

    def _strike(self) -> None:
        if self._is_over:
            return
        rng = self._kernel.rng
        rng.choice(self._acts)()
        self._kernel.at(rng.expovariate(1 / self._every_s), self._strike)

    # --- kinds of trouble

    def _freeze_client(self) -> None:
        self._freeze(self._kernel.rng.choice(self._world.clients).process, "clients frozen")

    def _freeze_node(self) -> None:
        node = self._kernel.rng.choice(self._world.nodes)
        self._freeze(node, "nodes frozen")

    def _cut_a_client_off(self) -> None:
        node = self._kernel.rng.choice(self._world.nodes)
        node.process.at(0.0, node.cut_off)

    def _freeze_role(self) -> None:
        assert self._world.serving is not None, "no roles to freeze"
        self._freeze(self._kernel.rng.choice(self._world.serving.roles).process, "roles frozen")

    def _freeze(self, thing: Any, what: str, durations_s: tuple[float, ...] = THAW_S) -> None:
        process: Process = getattr(thing, "process", thing)
        if not process.is_alive or process.is_frozen:
            return
        self._kernel.seen[what] += 1
        self._kernel.say("nemesis", f"stops {process.name}")
        process.freeze()
        self._frozen.append(thing)

        def thaw() -> None:
            if thing in self._frozen:
                self._frozen.remove(thing)
            self._kernel.say("nemesis", f"continues {process.name}")
            if process.is_alive:
                thing.thaw()

        self._kernel.at(self._kernel.rng.choice(durations_s), thaw)

    def _kill_client(self) -> None:
        self._kill(self._kernel.rng.choice(self._world.clients), "clients killed")

    def _kill_node(self) -> None:
        self._kill(self._kernel.rng.choice(self._world.nodes), "nodes killed")

    def _kill_role(self) -> None:
        assert self._world.serving is not None, "no roles to kill"
        self._kill(self._kernel.rng.choice(self._world.serving.roles), "roles killed")

    def _kill(self, thing: Any, what: str) -> None:
        if not thing.process.is_alive:
            return
        self._kernel.seen[what] += 1
        self._kernel.say("nemesis", f"kills {thing.process.name}")
        kill = getattr(thing, "kill", thing.process.kill)
        kill()
        self._dead.append(thing)

        def start() -> None:
            if not thing.process.is_alive:
                self._kernel.say("nemesis", f"starts {thing.process.name} again")
                thing.start()

        self._kernel.at(self._kernel.rng.choice((0.001, 0.02, 0.3)), start)

    def _storm_begins(self) -> None:
        weather = self._world.network.weather
        self._kernel.seen["storms"] += 1
        before = weather.loss_probability
        weather.loss_probability = 0.5

        def end() -> None:
            weather.loss_probability = 0.0 if self._is_over else before

        self._kernel.at(self._kernel.rng.uniform(0.05, 0.5), end)

    def _on_copy(self, process: Process) -> None:
        """A stop in the middle of a copy, most often beyond every lease; who is stopped does not read either."""
        if not self._is_over and self._kernel.chance(self._copy_probability):
            self._freeze(process, "processes frozen in a copy", (0.6, 1.2))
            if self._kernel.chance(0.5):
                for node in self._world.nodes:
                    node.process.at(0.01, partial(node.cut_off, process.name))

    def _spoil(self) -> None:
        if self._is_over:
            return
        self._kernel.at(self._kernel.rng.expovariate(5.0), self._spoil)
        self._kernel.rng.choice(self._world.nodes).spoil()
