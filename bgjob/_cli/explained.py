"""An explanation as labels and texts, for `bgjob explain` and `bgjob top`."""

from bgjob.explanation import Explanation

_DO = "do"


def lines(explanation: Explanation) -> list[tuple[str, str]]:
    """Return the job, each reason, and each remedy, with a label for each."""
    what = "queue" if explanation.id is None else "job"
    found = [(what, f"{explanation.id or explanation.queue}: {explanation.state}")]
    for reason in explanation.reasons:
        found.append((reason.code, reason.text))
        if reason.remedy:
            found.append((_DO, reason.remedy))
    return found
