"""What one node of a job does, from when it comes until all end.

It looks up its part in RUN_DIR/launch/placement.json and starts the trainer's ranks, an agent for vLLM servers, both,
or a server that tests programs. The nodes meet in a folder of the run (`rollout.rendezvous`): who is where, who lives,
what failed first. They end together: when rank 0 has ended, or as soon as one component has failed. Imports no torch.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from millrace.config.loading import load_recipe
from millrace.config.placement import NodeRanks, read_placement
from millrace.errors import MillraceError
from millrace.launch.job import CURRENT, Site, note_start, read_site
from millrace.launch.local import FINISHED, STOPPED, RankFailed, RankGroup, run_group
from millrace.launch.local import trainer_environment as local_environment
from millrace.launch.network import address_of, interface_of
from millrace.launch.node import CONTINUE
from millrace.launch.run_dir import RECIPE, locked
from millrace.launch.verifying import serve_programs
from millrace.ports import free_port
from millrace.rollout.agent import Agent
from millrace.rollout.rendezvous import (
    LAUNCH_FOLDER,
    PLACEMENT,
    RENDEZVOUS_VARIABLE,
    SILENT_SECONDS,
    Failure,
    NodeState,
    Pulse,
    Rendezvous,
    read_json,
)

FAILED = 1
BEAT_SECONDS = 1.0
WAIT_LOG_SECONDS = 10.0
NODES_LIMIT = 600.0
"""How long the nodes of a job may take to come."""
GRACE_SECONDS = 10.0
"""How long the ranks of a node may take to end by themselves after one of them failed."""
DYING_SECONDS = 10.0
"""A node that gives no sign of life for so long has died, when a rank has lost its connection or a stop was asked for:
the scheduler ends the others when one has died."""
TOGETHER_SECONDS = 20.0
"""How long the nodes may take to end after rank 0 has."""

log = logging.getLogger("millrace.rollout")


class NodeError(MillraceError):
    """A node cannot do its part."""


@dataclass(frozen=True)
class Seat:
    """What the scheduler says of this process."""

    node: int
    nodes: int
    host: str
    job: str
    """Another one for each start of the job."""


def slurm_seat(environment: Mapping[str, str]) -> Seat:
    """The seat that Slurm gives a task. Raises NodeError outside of a job step."""
    missing = [name for name in ("SLURM_JOB_ID", "SLURM_NODEID", "SLURM_STEP_NUM_NODES") if name not in environment]
    if missing:
        raise NodeError(f"{missing[0]} is not set: this command is for a step of a Slurm job, see `millrace launch`")
    return Seat(
        node=int(environment["SLURM_NODEID"]),
        nodes=int(environment["SLURM_STEP_NUM_NODES"]),
        host=environment.get("SLURMD_NODENAME") or socket.gethostname(),
        job=f"{environment['SLURM_JOB_ID']}.{environment.get('SLURM_RESTART_COUNT', '0')}",
    )


def run_node(run_dir: Path, until: str | None = None, *, stop_asked: Callable[[], bool]) -> int:
    """Exit code: that of the run on node 0, CONTINUE where it was stopped and saved; on other nodes 0 when it ended.

    stop_asked: whether a signal has asked for a stop since this process began.
    """
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s  %(message)s", datefmt="%H:%M:%S")
    launch = run_dir / LAUNCH_FOLDER
    try:
        seat = slurm_seat(os.environ)
        if not (launch / PLACEMENT).exists():
            raise NodeError(
                f"{launch / PLACEMENT} is not visible on {seat.host}; put run_dir on a disk that all nodes share"
            )
    except MillraceError as error:
        sys.stderr.write(f"{error}\n")
        return FAILED
    site = read_site(launch)
    os.environ.update(site.environment)
    return Node(run_dir, until, seat, site, stop_asked).run()


class Node:
    def __init__(
        self, run_dir: Path, until: str | None, seat: Seat, site: Site, stop_asked: Callable[[], bool]
    ) -> None:
        self.run_dir, self.until, self.seat, self.site = run_dir, until, seat, site
        self.placement = read_placement(run_dir / LAUNCH_FOLDER / PLACEMENT)
        self.meeting = Rendezvous(run_dir / LAUNCH_FOLDER / seat.job)
        self.state = NodeState(node=seat.node, host=seat.host)
        self.ranks = next((ranks for ranks in self.placement.trainer if ranks.node == seat.node), None)
        self._agent: Future[None] | None = None
        self._pulse = Pulse()
        self._asked_before = stop_asked
        self._asked = False
        self._suspicious = False
        self._superseded = False
        self._lost = threading.Event()
        """Set when the job has failed or another start of it has taken over, and where rank 0 is elsewhere, when it has
        ended."""

    def run(self) -> int:
        self.meeting.open()
        try:
            with ExitStack() as stack:
                code = self._run(stack)
        except MillraceError as error:
            code = self._fail("launch", str(error))
        self.meeting.announce(replace(self.state, ended=True))
        if self.seat.node == 0:
            self._end_together(code)
        failure = self.meeting.failure()
        if failure is not None and not failure.component and self.seat.node == 0:
            return CONTINUE  # a node was lost; where its processes alone were, the scheduler reports their exit code
        return FAILED if failure or self._superseded else code

    def _run(self, stack: ExitStack) -> int:
        address = address_of(self.seat.host, self.site.interface)
        self.state = replace(self.state, address=address, port=0 if self.seat.node else free_port(address))
        if self.seat.nodes != self.placement.nodes:
            raise NodeError(f"the job has {self.seat.nodes} nodes, but the run wants {self.placement.nodes}")
        if self.seat.node == 0:
            stack.enter_context(locked(self.run_dir))
            self.meeting.make_token()
            note_start(self.run_dir, self.seat.job)
        self.meeting.announce(self.state)
        threads, done = stack.enter_context(ThreadPoolExecutor(2)), threading.Event()
        stack.callback(done.set)
        threads.submit(self._beat, done)
        if not self._wait_for_nodes():
            return CONTINUE if self.seat.node == 0 else FINISHED
        if any(server.node == self.seat.node for server in self.placement.servers):
            agent = Agent(self.run_dir, self.meeting, self.seat.node, address)
            self._agent = threads.submit(agent.run, lambda: done.is_set() or self._over())
        for verifier in self.placement.verifiers:
            if verifier.node == self.seat.node:
                serve_programs(self.run_dir, self.meeting, verifier, address, self._over, lambda: self.stop_asked)
        code = FINISHED if self.ranks is None else self._train(self.ranks)
        if self.seat.node == 0:
            return CONTINUE if code == STOPPED else code
        self._wait_for_the_end()
        return FINISHED

    # ---- the parts

    def _train(self, ranks: NodeRanks) -> int:
        recipe = load_recipe(self.run_dir / RECIPE)
        head = self.meeting.node(0)
        assert head is not None, "the nodes were waited for"
        group = RankGroup(ranks.first_rank, ranks.ranks, recipe.parallel.world_size, head.address, head.port)
        environment = local_environment(recipe.trainer, ranks.ranks, recipe.precision)
        environment[RENDEZVOUS_VARIABLE] = str(self.meeting.folder)
        interface = self.site.interface or interface_of(self.state.address)
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            environment[name] = os.environ.get(name, interface)  # what env.sh says of the network goes before
        arguments = [str(self.run_dir), *([self.until] if self.until else [])]
        try:
            return run_group(
                "millrace.cascade.worker",
                arguments,
                group,
                environment,
                self.run_dir / "logs",
                grace=GRACE_SECONDS,
                given_up=self._lost.is_set,
                on_stop=self._note_stop,
            )
        except RankFailed as error:
            return self._rank_failed(error)

    def _wait_for_nodes(self) -> bool:
        """Wait for all nodes, as node 0, or for node 0; False when the job ends before."""
        wanted = range(self.placement.nodes) if self.seat.node == 0 else range(1)
        limit = time.monotonic() + NODES_LIMIT
        logged = time.monotonic()
        while missing := [number for number in wanted if self.meeting.node(number) is None]:
            if self.stop_asked or self._over():
                return False
            if time.monotonic() > limit:
                raise NodeError(f"waited {NODES_LIMIT:g} s for node {missing[0]} of {self.placement.nodes} in vain")
            if time.monotonic() - logged > WAIT_LOG_SECONDS:
                logged = time.monotonic()
                log.info("node %d waits for %d nodes, first node %d", self.seat.node, len(missing), missing[0])
            time.sleep(0.1)
        return True

    def _wait_for_the_end(self) -> None:
        """Wait until the job is over, as a node without rank 0."""
        while not self._over():
            time.sleep(0.1)

    def _over(self) -> bool:
        return self._lost.is_set() or self.meeting.over

    def _end_together(self, code: int) -> None:
        """Tell the other nodes that the run has ended, and wait for them, so that the scheduler ends none of them while
        it still ends its servers."""
        if self.meeting.ending() is None and not self.meeting.failure():
            self.meeting.end(code)
        limit = time.monotonic() + TOGETHER_SECONDS
        others = range(1, self.placement.nodes)  # also one that has not come yet: it will see that all is over
        while not all((state := self.meeting.node(number)) and state.ended for number in others):
            if time.monotonic() > limit or self.meeting.failure():
                return
            self._look_around()
            time.sleep(0.1)

    # ---- life and death

    def _beat(self, done: threading.Event) -> None:
        """Give signs of life, and notice when another node gives none, when one has failed, and when the job was
        started anew elsewhere."""
        while not done.wait(BEAT_SECONDS):
            if self._agent is not None and self._agent.done() and not self._over():
                self._fail("servers", f"the agent of the vLLM servers ended: {self._agent.exception()!r}")
            try:
                self.state = replace(self.state, beat=self.state.beat + 1)
                self.meeting.announce(self.state)
                self._look_around()
            except OSError as error:  # a shared disk that stutters: others see the missing beat
                log.warning("%s", error)

    def _look_around(self) -> None:
        current = read_json(self.run_dir / LAUNCH_FOLDER / CURRENT).get("job")
        if current not in (None, self.seat.job) and self.meeting.node(0) is not None:
            self._superseded = True
            self._lost.set()
        elif self.meeting.failure() is not None or (self.seat.node and self.meeting.over):
            self._lost.set()
        for number in range(self.placement.nodes) if self.seat.node == 0 else range(1):
            other = self.meeting.node(number)
            if other is None or number == self.seat.node or other.ended:
                continue
            silent = self._pulse.silent_for(other, time.monotonic())
            if silent > (DYING_SECONDS if self.stop_asked or self._suspicious else SILENT_SECONDS):
                reason = f"gave no sign of life for {silent:.0f} s, and did not say that it ends (out of memory?)"
                self._record_failure(Failure(node=number, host=other.host, component="", reason=reason))

    def _rank_failed(self, error: RankFailed) -> int:
        """A rank that fails after the scheduler has asked for the node may have lost anything: the job goes on from its
        last checkpoint."""
        if self.stop_asked:
            log.warning("%s; the run goes on from its last checkpoint", error)
            return STOPPED
        if error.lost_peer:
            self._suspicious = True
            limit = time.monotonic() + DYING_SECONDS + 2 * BEAT_SECONDS
            while self.meeting.failure() is None and time.monotonic() < limit:
                time.sleep(0.1)
        return self._fail("trainer", str(error), error.last_lines)

    def _fail(self, component: str, reason: str, last_lines: str = "") -> int:
        failure = Failure(
            node=self.seat.node, host=self.seat.host, component=component, reason=reason, last_lines=last_lines
        )
        self._record_failure(failure)
        return FAILED

    def _record_failure(self, failure: Failure) -> None:
        if self.meeting.fail(failure):
            sys.stderr.write(f"{failure}\n")
        self._lost.set()

    def _note_stop(self) -> None:
        self._asked = True

    @property
    def stop_asked(self) -> bool:
        """Whether a signal has asked for a stop: before the ranks were started, or while they ran."""
        return self._asked or self._asked_before()
