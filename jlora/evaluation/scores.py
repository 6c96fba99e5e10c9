"""Answers against references: exact match, ROUGE-L and chrF, by the libraries that papers use.

Needs rouge-score and sacrebleu (extra `eval`). Knows nothing of models or rows.
"""

import json
import re
from typing import Any

from jlora.errors import require_scores
from jlora.inference import answers as answering
from jlora.inference.answers import Question
from jlora.inference.model import Adapted
from jlora.reports import intervals

_WORD = re.compile(r"[^\W_]+")


class _Words:
    """ROUGE's words: runs of letters and digits in lower case, of any script.

    rouge-score's own tokenizer keeps a to z and 0 to 9 alone, so an answer in Greek has no words. On ASCII both agree.
    """

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text.lower())


def score(answers: list[str], references: list[str]) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Scores of all answers together, with `intervals` of 95 %, and of each.

    `exact_match`: the share of answers equal to the reference, but for space around them. `rouge_l`: F-measure of the
    longest common subsequence of words (0 to 1), the mean over answers. `chrf`: character n-gram F-score (0 to 100), of
    all n-grams together, as sacrebleu computes it for a corpus. An interval of ROUGE-L and chrF is None over too few.

    Raises:
      ConfigError: see `require_scores`.
    """
    require_scores()
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import CHRF

    class Chrf(CHRF):
        # sacrebleu's bootstrap sums in NumPy's float32 and scores a resample without a match 0.0, a Python float;
        # `statistics.mean` then refuses the two together.
        def _compute_score_from_stats(self, statistics: Any) -> Any:
            return super()._compute_score_from_stats([int(each) for each in statistics])

    rouge, chrf = RougeScorer(["rougeL"], tokenizer=_Words()), Chrf()
    each: list[dict[str, float]] = []
    for answer, reference in zip(answers, references, strict=True):
        each.append(
            {
                "exact_match": float(answer.strip() == reference.strip()),
                "rouge_l": float(rouge.score(reference, answer)["rougeL"].fmeasure),
                "chrf": float(chrf.sentence_score(answer, [reference]).score),
            }
        )
    total = {name: sum(one[name] for one in each) / len(each) for name in ("exact_match", "rouge_l")}
    enough = len(each) >= intervals.FEWEST
    together = chrf.corpus_score(answers, [references], n_bootstrap=intervals.RESAMPLES if enough else 1)
    bootstrap = None
    if enough:
        # What sacrebleu's own bootstrap says of the score, which it tells as text alone.
        said = json.loads(together.format(width=6, signature="metric:chrF", is_json=True))
        middle, half = float(said["confidence_mean"]), float(said["confidence_var"])
        bootstrap = [max(0.0, middle - half), min(100.0, middle + half)]
    spread = {
        "exact_match": intervals.share(sum(one["exact_match"] == 1 for one in each), len(each)),
        "rouge_l": intervals.mean([one["rouge_l"] for one in each]),
        "chrf": bootstrap,
    }
    return total | {"chrf": float(together.score), "intervals": spread}, each


def describe_scores(scores: dict[str, Any]) -> str:
    """Scores in a line."""
    return f"exact match {scores['exact_match']:.1%}, ROUGE-L {scores['rouge_l']:.4f}, chrF {scores['chrf']:.2f}"


def answer_and_score(model: Adapted, questions: list[Question], **how: Any) -> dict[str, Any]:
    """Greedy answers with their scores; `how` as for `jlora.inference.answers.answer`.

    Returns {"exact_match", "rouge_l", "chrf"} of all (see `score`), "generated" (how many), "mean_tokens",
    "seconds" and "answers", which holds {"text", "tokens", "ended"} and the scores of each.
    """
    found = answering.answer(model, [question.ids for question in questions], **how)
    total, each = score(found.texts, [question.reference for question in questions])
    answers = [
        {"text": text, "tokens": tokens, "ended": ended} | scores
        for text, tokens, ended, scores in zip(found.texts, found.tokens, found.ended, each, strict=True)
    ]
    mean = sum(found.tokens) / len(answers)
    rest = {"generated": len(answers), "mean_tokens": mean, "seconds": found.seconds, "answers": answers}
    return total | rest
