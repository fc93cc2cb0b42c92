"""Groups of answers for the tests of the stages."""

from millrace.environments.base import Reward
from millrace.rollout.types import Rollout
from millrace.stages.groups import Episode, Group, Scored


def group(rewards, *, name="7", domain="math", prompt=(1, 2, 3), lengths=None, finish="stop", version=0) -> Group:
    """A group whose k-th answer has rewards[k] and lengths[k] tokens."""
    lengths = lengths or [2] * len(rewards)
    episode = Episode(name, domain, {"prompt": "?"}, [{"role": "user", "content": "?"}], tuple(prompt), seed=5)
    answers = tuple(
        Scored(
            Rollout(
                request_id=f"{domain}/{name}/5",
                index=k,
                prompt=tuple(prompt),
                answer=tuple(range(10, 10 + n)),
                rollout_logp=tuple(-0.25 * (i + 1) for i in range(n)),
                finish_reason=finish if isinstance(finish, str) else finish[k],
                weight_version=version,
                engine="http://127.0.0.1:1",
            ),
            f"answer {k}",
            Reward(r, "correct" if r else "wrong", {"share": r}),
        )
        for k, (r, n) in enumerate(zip(rewards, lengths, strict=True))
    )
    return Group(episode, answers)
