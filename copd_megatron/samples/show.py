"""Samples in a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.text import Text

from copd_megatron.samples.record import Sample, Verdict
from copd_megatron.untrusted.visible import visible

_STYLES = {
    Verdict.right: "bold green",
    Verdict.partial: "bold yellow",
    Verdict.wrong: "bold red",
    Verdict.ungraded: "bold magenta",
}
_STRONG, _CLEAR = 2.0, 0.5
"""|log-ratio| in nats from which a token is coloured strongly, or at all."""

LEGEND = "tokens: green where the teacher finds them likelier than the student does, red where less likely"


def shown(sample: Sample) -> Iterator[Text]:
    """The sample as paragraphs: what it is, the prompt, the gold answer, the response.

    Tokens have the colour of the teacher's log-ratio, where a teacher scored them. Control characters are
    shown, not sent: a response cannot move the cursor.
    """
    yield _header(sample)
    yield Text.assemble(("prompt    ", "dim"), visible(sample.prompt))
    yield Text.assemble(
        ("gold      ", "dim"), visible(sample.gold), (f"  ({visible(sample.verifier)})", "dim")
    )
    yield Text.assemble(("response  ", "dim"), *_response(sample))


def token_style(ratio: float | None) -> str:
    """The colour of a token of this log-ratio; none near 0."""
    if ratio is None or abs(ratio) < _CLEAR:
        return ""
    color = "green" if ratio > 0 else "red"
    return f"bold {color}" if abs(ratio) >= _STRONG else color


def _header(sample: Sample) -> Text:
    reward = "" if sample.reward is None else f" {sample.reward:g}"
    about = [
        f"step {sample.step}",
        visible(sample.model),
        visible(sample.edge or sample.kind.value),
        visible(sample.prompt_id),
        f"response {sample.sample_index}",
        f"{sample.num_response_tokens} tokens" + (", truncated" if sample.truncated else ""),
        f"weights {sample.weight_version}",
    ]
    ratios = [ratio for ratio in sample.log_ratios() if ratio is not None]
    if ratios:
        about.append(f"teacher gap {sum(ratios) / len(ratios):+.3f}")
    verdict = (f"{sample.verdict.value}{reward}", _STYLES[sample.verdict])
    return Text.assemble(verdict, "  ", (" · ".join(about), "bold"))


def _response(sample: Sample) -> Iterator[tuple[str, str]]:
    tokens = zip(sample.pieces(), sample.log_ratios(), strict=True)
    for number, (piece, ratio) in enumerate(tokens):
        if number == sample.cut_at:
            yield f" […{sample.num_left_out} tokens…] ", "dim"
        yield visible(piece), token_style(ratio)
