"""Groups of answers for the tests of the stages."""

from millrace.environments.base import Reward
from millrace.rollout.types import Rollout
from millrace.stages.groups import Episode, Group, Scored


def group(
    rewards,
    *,
    name="7",
    domain="math",
    prompt=(1, 2, 3),
    lengths=None,
    finish="stop",
    version=0,
    given=(),
    masked=(),
    cut=None,
) -> Group:
    """A group whose k-th answer has rewards[k] and lengths[k] tokens, those of the environment at `given`; the answers
    `masked` are."""
    lengths = lengths or [2] * len(rewards)
    episode = Episode(
        name, domain, {"prompt": "?"}, [{"role": "user", "content": "?"}], tuple(prompt), seed=5, turns=bool(given)
    )
    answers = tuple(
        Scored(
            Rollout(
                request_id=f"{domain}/{name}/5",
                index=k,
                prompt=tuple(prompt),
                answer=tuple(range(10, 10 + n)),
                rollout_logp=tuple(0.0 if _inside(given, i) else -0.25 * (i + 1) for i in range(n)),
                finish_reason=finish if isinstance(finish, str) else finish[k],
                weight_version=version,
                engine="http://127.0.0.1:1",
                given=tuple(given),
            ),
            f"answer {k}",
            Reward(r, "correct" if r else "wrong", {"share": r}, k in masked),
            cut,
        )
        for k, (r, n) in enumerate(zip(rewards, lengths, strict=True))
    )
    return Group(episode, answers)


def _inside(given, place) -> bool:
    return any(start <= place < end for start, end in given)
