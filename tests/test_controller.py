"""How much is speculated, on machines made of formulae: no clock, no model."""

import random
from dataclasses import dataclass

import numpy as np
import pytest

from specinfer.draft.rounds import Prices
from specinfer.engine import controller as module
from specinfer.engine.controller import Controller
from specinfer.engine.goodput import PROBE_EVERY, bucket_of
from specinfer.engine.host import HOST_S, HostTimes
from specinfer.engine.stats import Pass, StepLoad
from specinfer.engine.times import StepTimes


def line(first_s: float, token_s: float, span_s: float = 0.0) -> StepTimes:
    """A step of one token takes `first_s`, every further one adds `token_s`."""
    sizes = [1, 4, 16, 64, 512]
    return StepTimes(sizes, [first_s + token_s * (size - 1) for size in sizes], span_s)


FLAT = (20e-3, 1e-5)
STEEP = (20e-3, 20e-3)


@dataclass
class Machine:
    """A target, a drafter (None: one without a model) and a batch whose chains are accepted.

    acceptance  the chance of each token of a chain, given all before it
    """

    target: StepTimes
    drafter: StepTimes | None
    acceptance: float
    batch: int
    host_s: tuple[float, ...] = HOST_S
    depth: int = 16

    def controller(self) -> Controller:
        """One that starts from the truth."""
        copies = [t and StepTimes.from_json(t.to_json()) for t in (self.target, self.drafter)]
        assert copies[0] is not None
        return Controller(copies[0], [copies[1]])

    def seconds(self, depth: int) -> tuple[list[Pass], float, float]:
        """The passes of a step with chains so deep, the target's seconds, and the host's."""
        times = self.drafter
        pass_s = 0.0 if times is None else times.seconds(self.batch, self.batch)
        passes = [Pass(0, self.batch, self.batch, self.batch, pass_s) for _ in range(depth)]
        host = HostTimes._make(self.host_s)
        nodes = self.batch * depth
        host_s = host.step + host.span * self.batch + host.node * nodes
        host_s += host.draft * (depth > 0) + host.round * depth
        return passes, self.target.seconds(self.batch + nodes, self.batch), host_s

    def goodput(self, depth: int) -> float:
        """Expected tokens per second."""
        passes, target_s, host_s = self.seconds(depth)
        if self.drafter is None:
            host_s += depth * self.batch * module._FREE_PASS_S
        tokens = self.batch * sum(self.acceptance**d for d in range(depth + 1))
        return tokens / (target_s + host_s + sum(each.seconds for each in passes))

    @property
    def best(self) -> float:
        """The greatest goodput of all depths."""
        return max(self.goodput(depth) for depth in range(self.depth + 1))

    def choose(self, prices: Prices) -> int:
        """How deep chains grow at these prices: while a pass and its nodes are worth it."""
        taken = 0.0
        for depth in range(self.depth):
            gain = self.acceptance ** (depth + 1) - prices.nodes[self.batch * depth]
            rounds = prices.rounds if depth else prices.first_rounds
            if self.batch * gain <= rounds[0][self.batch]:
                return depth
            taken += gain
        return self.depth

    def step(self, controller: Controller, rng: random.Random) -> int:
        """One step as the engine takes it; returns how deep its chains were."""
        depth = 0
        if not controller.rests(self.batch):
            prices = controller.prices(self.batch, self.batch, 1 + self.batch * self.depth)
            depth = self.choose(prices)
        emitted = sum(1 + self.accepted(depth, rng) for _ in range(self.batch))
        controller.observe(self.load(depth, emitted), decoding_only=True)
        return depth

    def accepted(self, depth: int, rng: random.Random) -> int:
        """Tokens of one chain until a coin says no."""
        return next((d for d in range(depth) if rng.random() >= self.acceptance), depth)

    def load(self, depth: int, emitted: int) -> StepLoad:
        """What a step with chains so deep was."""
        passes, target_s, host_s = self.seconds(depth)
        nodes = self.batch * depth
        return StepLoad(self.batch + nodes, self.batch, emitted, nodes, passes, target_s, host_s)


def serve(machine: Machine, controller: Controller | None = None, steps: int = 400) -> list[int]:
    """The depth of each step."""
    controller, rng = controller or machine.controller(), random.Random(1)
    return [machine.step(controller, rng) for _ in range(steps)]


# --- prices ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 7, 40])
@pytest.mark.parametrize(("first_s", "token_s"), [FLAT, STEEP, (1e-3, 0.0)])
def test_prices_never_fall(first_s: float, token_s: float, batch: int) -> None:
    controller = Controller(line(first_s, token_s, 1e-4), [line(1e-3, 1e-5), None])
    prices = controller.prices(batch, batch, 100)
    assert len(prices.nodes) == len(prices.totals) == 100
    assert (np.diff(prices.nodes) >= -1e-12).all()
    assert prices.totals[0] == 0
    assert (np.diff(prices.totals) > 0).all()
    for rounds in prices.rounds:
        assert len(rounds) == 100
        assert rounds[0] > 0
        assert (np.diff(rounds) >= 0).all()


def test_nodes_cost_together_what_their_prices_add_up_to() -> None:
    """Behind a jump too: the hull spreads it over the nodes that have to pay for it."""
    bumpy = StepTimes([1, 6, 7, 64, 512], [10e-3, 10e-3, 15e-3, 16e-3, 500e-3])
    prices = Controller(bumpy, []).prices(1, 1, 64)
    assert prices.nodes[:5].sum() == pytest.approx(prices.totals[5])
    assert prices.nodes[:63].sum() == pytest.approx(prices.totals[63])
    assert prices.nodes[5] < prices.totals[6] / 5, "nobody would ever get past it"


def test_an_expensive_target_gets_no_nodes_and_a_flat_one_many() -> None:
    for batch in (1, 32):
        steep = Controller(line(*STEEP), [None]).prices(batch, batch, 65)
        assert steep.nodes[0] > 0.5, "a node costs about as much as it can bring"
    flat = Controller(line(*FLAT), [None]).prices(1, 1, 65)
    assert flat.nodes[-1] < 0.01


def test_prices_are_in_tokens_of_the_past_steps() -> None:
    """λ is plain decoding's goodput until steps have brought more, and never less than it."""
    machine = Machine(line(*FLAT), line(1e-4, 0.0), 0.9, 1)
    controller = machine.controller()
    plain = controller.goodput(1, 1)
    assert plain == pytest.approx(machine.goodput(0))
    before = controller.prices(1, 1, 9)
    controller.observe(machine.load(4, 1), decoding_only=True)
    assert controller.goodput(1, 1) == plain, "a bad step makes nothing cheaper than plain ones do"
    for _ in range(50):
        controller.observe(machine.load(4, 5), decoding_only=True)
    ratio = controller.goodput(1, 1) / plain
    assert 3 < ratio < 5
    after = controller.prices(1, 1, 9)
    assert after.nodes == pytest.approx(before.nodes * ratio, rel=0.1)
    assert after.rounds[0] == pytest.approx(before.rounds[0] * ratio, rel=0.1)


# --- convergence ----------------------------------------------------------------------------------

MACHINES = {
    f"{name}, batch {batch}, {acceptance}": Machine(line(*times), drafter, acceptance, batch)
    for name, times, drafter in (
        ("flat", FLAT, line(1e-3, 1e-5)),
        ("sloping", (20e-3, 1e-3), line(1e-3, 1e-5)),
        ("steep", STEEP, line(1e-3, 1e-5)),
        ("dear drafter", FLAT, line(8e-3, 1e-5)),
        ("no model", (20e-3, 1e-3), None),
    )
    for batch in (1, 4, 32)
    for acceptance in (0.3, 0.8, 0.95)
}


def over_time(machine: Machine, depths: list[int]) -> float:
    """Expected tokens per second of steps with chains so deep."""
    tokens = [sum(machine.acceptance**d for d in range(depth + 1)) for depth in depths]
    seconds = [each / machine.goodput(depth) for each, depth in zip(tokens, depths, strict=True)]
    return sum(tokens) / sum(seconds)


@pytest.mark.parametrize("name", MACHINES)
def test_control_ends_near_the_best_depth_and_never_loses(name: str) -> None:
    machine = MACHINES[name]
    depths = serve(machine)
    settled = over_time(machine, depths[100:])
    assert settled >= 0.98 * machine.best
    assert settled >= 0.995 * machine.goodput(0), "probes may cost this much"
    assert machine.goodput(depths[0]) >= machine.goodput(0), "the very first step loses nothing"


def test_some_machines_speculate_deeply_and_some_not_at_all() -> None:
    """Nothing above would notice a controller that does the same everywhere."""
    last = {name: serve(machine, steps=150)[-1] for name, machine in MACHINES.items()}
    assert last["flat, batch 1, 0.95"] >= 12
    assert 1 <= last["sloping, batch 1, 0.8"] <= 8
    assert last["steep, batch 32, 0.3"] == last["steep, batch 32, 0.95"] == 0


@pytest.mark.parametrize(
    "name", ["flat, batch 1, 0.8", "sloping, batch 4, 0.8", "steep, batch 4, 0.3"]
)
def test_a_uniformly_slower_machine_decides_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = MACHINES[name]
    assert fast.drafter is not None
    expected = serve(fast)

    def slower(times: StepTimes) -> StepTimes:
        return StepTimes(times.sizes, [3 * times.seconds(size) for size in times.sizes])

    host_s = HostTimes._make(3 * each for each in HOST_S)
    slow = Machine(
        slower(fast.target), slower(fast.drafter), fast.acceptance, fast.batch, host_s=host_s
    )
    monkeypatch.setattr(module, "HOST_S", host_s)
    assert serve(slow) == expected


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_wrong_slopes_cost_little(factor: float) -> None:
    """The drafted sizes are learnt from steps; what a plain one takes, only while there are any."""
    machine = MACHINES["sloping, batch 4, 0.8"]
    wrong = Machine(line(20e-3, factor * 1e-3), machine.drafter, 0.8, 4).controller()
    assert over_time(machine, serve(machine, wrong, 1500)[1000:]) >= 0.95 * machine.best


# --- rests and probes -----------------------------------------------------------------------------


@pytest.fixture
def resting() -> tuple[Machine, Controller]:
    """A controller that has found nothing worth its price for a while."""
    machine = MACHINES["steep, batch 4, 0.3"]
    controller = machine.controller()
    assert not any(serve(machine, controller, 20))
    return machine, controller


def test_a_resting_engine_looks_again_every_eighth_step(
    resting: tuple[Machine, Controller],
) -> None:
    machine, controller = resting
    looked = []
    for _ in range(64):
        looked.append(not controller.rests(4))
        machine.step(controller, random.Random(0))
    assert sum(looked) == 8
    assert np.diff(np.flatnonzero(looked)).tolist() == [8] * 7


def test_one_that_has_rested_for_long_looks_seldom(resting: tuple[Machine, Controller]) -> None:
    machine, controller = resting
    for _ in range(300):
        machine.step(controller, random.Random(0))
    looked = []
    for _ in range(2 * PROBE_EVERY):
        looked.append(not controller.rests(4))
        controller.observe(machine.load(0, 4), decoding_only=True)
    assert sum(looked) == 2


def test_another_batch_size_wakes_it(resting: tuple[Machine, Controller]) -> None:
    machine, controller = resting
    while not controller.rests(4):
        machine.step(controller, random.Random(0))
    assert not controller.rests(1)
    assert not controller.rests(16)
    assert controller.rests(4)


def test_a_drafted_node_ends_the_rest(resting: tuple[Machine, Controller]) -> None:
    machine, controller = resting
    controller.observe(machine.load(1, 8), decoding_only=True)
    for _ in range(9):
        assert not controller.rests(4)
        machine.step(controller, random.Random(0))


def test_a_probe_is_priced_lower(resting: tuple[Machine, Controller]) -> None:
    """Now and then, where nothing is drafted, so that a drafter may show that it has changed."""
    machine, controller = resting
    prices: dict[int, Prices] = {}
    for number in range(20, 20 + 2 * PROBE_EVERY):
        prices[number] = controller.prices(4, 4, 9)
        controller.observe(machine.load(0, 4), decoding_only=True)
    usual = prices[21]
    low = [number for number, each in prices.items() if each.nodes[0] < 0.9 * usual.nodes[0]]
    first = PROBE_EVERY
    assert low == [first, 2 * first]
    probe = prices[first]
    for now, then in ((probe.nodes, usual.nodes), (probe.totals, usual.totals)):
        assert now[:4] == pytest.approx(then[:4] / 2)
    # One node of each sequence: the others cost what they do, and prices still never fall.
    assert probe.nodes[4:] == pytest.approx(usual.nodes[4:])
    assert np.diff(probe.totals[4:]) == pytest.approx(np.diff(usual.totals[4:]))
    assert probe.rounds[0] == pytest.approx(usual.rounds[0] / 2)


# --- what is learnt -------------------------------------------------------------------------------


def test_host_costs_follow() -> None:
    """The host is several times slower than was thought: a step's expected time shows it."""
    dear = HostTimes(2e-3, 4e-4, 1e-4, 1e-3, 2e-3)
    machine = Machine(line(1e-3, 1e-5), line(1e-4, 0.0), 0.9, 2, host_s=dear)
    controller = machine.controller()
    serve(machine, controller, 2000)
    assert controller.goodput(2, 2) == pytest.approx(machine.best, rel=0.1)


def test_one_busy_moment_of_the_host_changes_little() -> None:
    machine = MACHINES["flat, batch 1, 0.8"]
    controller = machine.controller()
    before = controller.goodput(1, 1)
    load = machine.load(0, 1)
    load.host_s = 10.0
    controller.observe(load, decoding_only=True)
    assert controller.goodput(1, 1) == pytest.approx(before, rel=0.01)


def test_a_drafter_without_a_model_is_nearly_free() -> None:
    controller = Controller(line(*FLAT), [None])
    assert controller.pass_s(Pass(0, 5, 1, 5, 3.0)) == pytest.approx(5 * module._FREE_PASS_S)
    controller.observe(
        StepLoad(6, 1, 2, 5, [Pass(0, 5, 1, 5, 3.0)], 20e-3, 1e-3), decoding_only=True
    )
    assert controller.pass_s(Pass(0, 5, 1, 5, 3.0)) == pytest.approx(5 * module._FREE_PASS_S)


def test_a_drafters_own_passes_correct_its_times() -> None:
    """By the tokens that were computed, those it had to catch up with too."""
    controller = Controller(line(*FLAT), [line(1e-3, 0.0)])
    for _ in range(40):
        passes = [Pass(0, 1, 1, 64, 9e-3), Pass(0, 1, 1, 1, 2e-3)]
        controller.observe(StepLoad(2, 1, 2, 1, passes, 20e-3, 4e-4), decoding_only=True)
    assert controller.pass_s(Pass(0, 1, 1, 1, 0.0)) == pytest.approx(2e-3, rel=0.1)
    assert controller.pass_s(Pass(0, 1, 1, 64, 0.0)) > 3e-3


def test_steps_with_prompts_teach_nothing_of_decoding() -> None:
    machine = MACHINES["flat, batch 1, 0.8"]
    controller = machine.controller()
    before = controller.goodput(1, 1)
    for _ in range(100):
        controller.observe(StepLoad(1, 1, 1, 0, [], 9.0, 9.0), decoding_only=False)
    assert controller.goodput(1, 1) == before
    assert not controller.rests(1)


def test_batch_sizes_share_what_is_known_by_half_octaves() -> None:
    buckets = [bucket_of(size) for size in (1, 2, 3, 4, 8, 9, 16, 17, 18, 64)]
    assert buckets == sorted(buckets)
    assert bucket_of(16) == bucket_of(17) == bucket_of(18)
    assert len({bucket_of(size) for size in (1, 2, 3, 4, 6, 8)}) == 6
    machine = MACHINES["flat, batch 4, 0.95"]
    controller = machine.controller()
    before = controller.goodput(1, 1)
    serve(machine, controller, 50)
    assert controller.goodput(1, 1) == before
    assert controller.goodput(4, 4) > 1.5 * machine.goodput(0)


# --- the clock ------------------------------------------------------------------------------------


def test_trees_that_lose_by_the_clock_rest() -> None:
    """Whatever the model of times says of them: here every step with a tree takes five times it."""
    machine = MACHINES["flat, batch 1, 0.8"]
    controller, rng, depths = machine.controller(), random.Random(2), []
    tokens = seconds = 0.0
    for step in range(2500):
        depth = 0
        if not controller.rests(1):
            depth = machine.choose(controller.prices(1, 1, 1 + machine.depth))
        load = machine.load(depth, 1 + machine.accepted(depth, rng))
        if depth:
            load.target_s *= 5
        controller.observe(load, decoding_only=True)
        depths.append(depth)
        if step >= 500:
            tokens += load.num_emitted
            seconds += load.target_s + load.host_s + sum(each.seconds for each in load.passes)
    assert any(depths[:5]), "it drafts until the clock has spoken"
    assert sum(depth > 0 for depth in depths[500:]) < 0.1 * 2000
    assert tokens / seconds > 0.96 * machine.goodput(0)
    assert controller.rests(1) or not controller.rests(64), "another batch size is judged by itself"
