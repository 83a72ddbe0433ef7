"""Metrics by name, from the libraries that the benchmarks themselves use, on plain answers and references."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import numpy as np

from deltaexp.errors import ConfigError, TaskError, unknown
from deltaexp.lab.taskconfig import METRIC_PACKAGES


@dataclass
class Measured:
    """What a metric is given."""

    answers: Sequence[Any]
    """One for each row: the number of a label, a number, a text, or a list of tags."""
    references: Sequence[Any]
    """What each is compared with; for texts also a list of texts that are all right."""
    groups: Sequence[Any] | None = None
    """By what rows belong together."""
    labels: Sequence[str] = field(default_factory=list)
    """Names of the classes."""


Metric = Callable[[Measured], Mapping[str, float]]
METRICS: dict[str, Metric] = {}
"""The metrics by name; the first number of each bears the metric's own name."""
LOWER_IS_BETTER = {"mse", "perplexity", "loss", "bits_per_byte"}


def metric(function: Metric) -> Metric:
    """Add a function to the table of metrics, under its own name; used as a decorator."""
    METRICS[function.__name__] = function
    return function


def main(names: Sequence[str]) -> str:
    """Return the name of the number that the first of these metrics is known by."""
    if not names:
        return "loss"
    return names[0].rpartition(":")[2]


def greater_is_better(name: str) -> bool:
    """Say whether a higher value is better."""
    return name not in LOWER_IS_BETTER


def check(names: Sequence[str]) -> None:
    """Check that metrics can be computed, before anything is trained.

    Raises:
        ConfigError: If there is no such metric, or a package that it needs is not installed.
    """
    for name in names:
        if ":" in name:
            _own(name)
        elif name not in METRICS:
            raise ConfigError(unknown("metric", name, METRICS))
        package = METRIC_PACKAGES.get(name)
        if package is not None and find_spec(package) is None:
            raise ConfigError(f"The metric {name!r} needs the package {package}: pip install 'deltaexp[metrics]'.")


def compute(
    names: Sequence[str],
    answers: Sequence[Any],
    references: Sequence[Any],
    *,
    groups: Sequence[Any] | None = None,
    labels: Sequence[str] = (),
) -> dict[str, float]:
    """Return the numbers of several metrics by name.

    Args:
        names: Names in the table, or ``package.module:function`` for a function from `Measured` to numbers by name.
        answers: One for each row.
        references: What they are compared with.
        groups: By what rows belong together.
        labels: Names of the classes.

    Raises:
        ConfigError: If there is no such metric.
        TaskError: If a metric cannot make anything of the answers.
    """
    measured = Measured(answers, references, groups, labels)
    found: dict[str, float] = {}
    for name in names:
        chosen = _own(name) if ":" in name else METRICS.get(name)
        if chosen is None:
            raise ConfigError(unknown("metric", name, METRICS))
        values = chosen(measured)
        if not isinstance(values, Mapping):
            values = {main([name]): values}
        for key, value in values.items():
            found[key] = float(value)
    return found


def _own(name: str) -> Callable[..., Any]:
    """Return a metric that is a function of the user's own."""
    from deltaexp.lab.tasks.columns import function  # imports datasets, which a report does without

    return function(name, "task.metrics")


@metric
def accuracy(measured: Measured) -> dict[str, float]:
    """Return the part of the answers that are right."""
    right = [answer == reference for answer, reference in zip(measured.answers, measured.references, strict=True)]
    return {"accuracy": float(np.mean(right))}


@metric
def f1(measured: Measured) -> dict[str, float]:
    """Return F1: of the class with number 1 where there are two, else the mean over the classes."""
    from sklearn.metrics import f1_score

    average = "binary" if len(measured.labels) == 2 else "macro"
    return {"f1": float(f1_score(measured.references, measured.answers, average=average, zero_division=0))}


@metric
def matthews_correlation(measured: Measured) -> dict[str, float]:
    """Return Matthews' correlation."""
    from sklearn.metrics import matthews_corrcoef

    return {"matthews_correlation": float(matthews_corrcoef(measured.references, measured.answers))}


@metric
def pearson(measured: Measured) -> dict[str, float]:
    """Return Pearson's correlation; 0 where the answers are all the same, of which it knows nothing."""
    return {"pearson": _correlation("pearsonr", measured)}


@metric
def spearman(measured: Measured) -> dict[str, float]:
    """Return Spearman's correlation of ranks; 0 where the answers are all the same."""
    return {"spearman": _correlation("spearmanr", measured)}


def _correlation(name: str, measured: Measured) -> float:
    from scipy import stats

    if len(measured.answers) < 2 or np.ptp(measured.answers) == 0 or np.ptp(measured.references) == 0:
        return 0.0
    return float(getattr(stats, name)(measured.answers, measured.references).statistic)


@metric
def mse(measured: Measured) -> dict[str, float]:
    """Return the mean squared error."""
    return {"mse": float(np.mean((np.asarray(measured.answers) - np.asarray(measured.references)) ** 2))}


@metric
def exact_match(measured: Measured) -> dict[str, float]:
    """Return the part of the answers that equal a reference, up to white space at the ends."""
    return {"exact_match": float(np.mean([_among(a, r) for a, r in zip(measured.answers, measured.references, strict=True)]))}


def _among(answer: str, reference: Any) -> bool:
    return answer.strip() in [text.strip() for text in alternatives(reference)]


def alternatives(reference: Any) -> list[str]:
    """Return the texts that are right, of one text or a list of them."""
    return [reference] if isinstance(reference, str) else list(reference)


def _sources(measured: Measured) -> tuple[list[str], list[list[str]]]:
    """Return one answer for each source, and all of its references: those of every row of its group.

    Rows of a group ask the same, so they are answered the same; the first answer stands for all.
    """
    if measured.groups is None:
        return list(measured.answers), [alternatives(reference) for reference in measured.references]
    answers: dict[Any, str] = {}
    references: dict[Any, list[str]] = {}
    for group, answer, reference in zip(measured.groups, measured.answers, measured.references, strict=True):
        answers.setdefault(group, answer)
        references.setdefault(group, []).extend(alternatives(reference))
    return list(answers.values()), list(references.values())


def streams(references: Sequence[Sequence[str]]) -> list[list[Any]]:
    """Return references as sacrebleu takes them: the first of every source, the second of every source, and so on."""
    most = max(map(len, references))
    return [[texts[number] if number < len(texts) else None for texts in references] for number in range(most)]


@metric
def bleu(measured: Measured) -> dict[str, float]:
    """Return the corpus BLEU of sacrebleu (Papineni et al., 2002; Post, 2018), from 0 to 100, in its default settings."""
    from sacrebleu.metrics import BLEU

    answers, references = _sources(measured)
    return {"bleu": BLEU().corpus_score(answers, streams(references)).score}


@metric
def chrf(measured: Measured) -> dict[str, float]:
    """Return the corpus chrF of sacrebleu (Popovic, 2015), from 0 to 100, in its default settings."""
    from sacrebleu.metrics import CHRF

    answers, references = _sources(measured)
    return {"chrf": CHRF().corpus_score(answers, streams(references)).score}


@metric
def rouge(measured: Measured) -> dict[str, float]:
    """Return the mean F1 of ROUGE-1, 2, L and Lsum (Lin, 2004) with stemming, from 0 to 1; of several references the best."""
    from rouge_score.rouge_scorer import RougeScorer

    kinds = ("rouge1", "rouge2", "rougeL", "rougeLsum")
    scorer = RougeScorer(kinds, use_stemmer=True)
    answers, references = _sources(measured)
    scores = []
    for answer, texts in zip(answers, references, strict=True):
        found = scorer.score_multi(texts, answer)
        scores.append([found[kind].fmeasure for kind in kinds])
    means = dict(zip(kinds, np.mean(scores, axis=0).tolist(), strict=True))
    return {"rouge": means["rougeL"], **means}


@metric
def seqeval(measured: Measured) -> dict[str, float]:
    """Return F1, precision and recall of whole entities (micro average), as CoNLL-2003 measures tags like B-X and I-X."""
    from seqeval.metrics import f1_score, precision_score, recall_score

    references, answers = [list(tags) for tags in measured.references], [list(tags) for tags in measured.answers]
    odd = {tag for tags in references for tag in tags if not re.fullmatch(r"O|[BIES]-.+|[BIES]", tag)}
    if odd:
        raise TaskError(
            f"The metric 'seqeval' counts entities, and {sorted(odd)[0]!r} is no tag like B-PER, I-PER or O. For tags of "
            "single tokens take task.metrics=[token_accuracy]; else name the tags in task.labels."
        )
    return {
        "seqeval": float(f1_score(references, answers, zero_division=0)),
        "seqeval_precision": float(precision_score(references, answers, zero_division=0)),
        "seqeval_recall": float(recall_score(references, answers, zero_division=0)),
    }


@metric
def token_accuracy(measured: Measured) -> dict[str, float]:
    """Return the part of all tags that are right."""
    rows = zip(measured.answers, measured.references, strict=True)
    right = [one == other for answer, reference in rows for one, other in zip(answer, reference, strict=True)]
    return {"token_accuracy": float(np.mean(right)) if right else 0.0}


PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Return a text as the evaluation of SQuAD compares it: lower case, without punctuation, articles and extra spaces."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(PUNCTUATION)).split())


def _overlap(answer: str, reference: str) -> float:
    """Return F1 of the words of two texts; where one of them has none, whether both have none."""
    found, right = normalised(answer).split(), normalised(reference).split()
    if not found or not right:
        return float(found == right)
    common = sum((Counter(found) & Counter(right)).values())
    return 2 * common / (len(found) + len(right))


def _best(measured: Measured, name: str) -> dict[str, float]:
    """Return word F1 and exact match, each with the best of a row's references; no reference means that "" is right."""
    f1s, matches = [], []
    for answer, reference in zip(measured.answers, measured.references, strict=True):
        texts = [text for text in alternatives(reference) if normalised(text)] or [""]
        f1s.append(max(_overlap(answer, text) for text in texts))
        matches.append(max(normalised(answer) == normalised(text) for text in texts))
    return {name: float(np.mean(f1s)), f"{name}_exact_match": float(np.mean(matches))}


@metric
def squad(measured: Measured) -> dict[str, float]:
    """Return word F1 and exact match as SQuAD 1.1 and 2.0 (Rajpurkar et al., 2016, 2018) measure them, from 0 to 1."""
    return _best(measured, "squad")


@metric
def record(measured: Measured) -> dict[str, float]:
    """Return word F1 and exact match as ReCoRD (Zhang et al., 2018) measures them: the best over all right entities."""
    return _best(measured, "record")


@metric
def gsm8k(measured: Measured) -> dict[str, float]:
    """Return the part of the answers whose number behind ``####`` is the reference's (Cobbe et al., 2021)."""
    pairs = zip(measured.answers, measured.references, strict=True)
    right = [_result(answer) == _result(reference) is not None for answer, reference in pairs]
    return {"gsm8k": float(np.mean(right))}


def _result(text: str) -> str | None:
    found = re.search(r"#### (-?[0-9.,]+)", text)
    return found[1].strip().replace(",", "") if found else None


@metric
def multirc(measured: Measured) -> dict[str, float]:
    """Return what SuperGLUE measures MultiRC by: F1 over all answers, exact match over questions, and the mean of both.

    A row is an answer, whose label says with 1 that it is right; a group is a question, right if all of its answers are.

    Raises:
        TaskError: If the task names no column for groups.
    """
    from sklearn.metrics import f1_score

    if measured.groups is None:
        raise TaskError("The metric 'multirc' needs to know which answers belong to one question: set task.group to a column.")
    right: dict[Any, bool] = {}
    for group, answer, reference in zip(measured.groups, measured.answers, measured.references, strict=True):
        right[group] = right.get(group, True) and answer == reference
    f1_a = float(f1_score(measured.references, measured.answers, zero_division=0))
    exact = float(np.mean(list(right.values())))
    return {"multirc": (f1_a + exact) / 2, "multirc_f1": f1_a, "multirc_exact_match": exact}


def _likelihood(answers: Iterable[Sequence[float]]) -> tuple[float, float]:
    """Return the sums of negative log-likelihoods and of tokens.

    Raises:
        TaskError: If the answers are none of a kind of task that measures likelihoods.
    """
    try:
        table = np.asarray(list(answers), dtype=np.float64).reshape(-1, 2)
    except (TypeError, ValueError) as error:
        raise TaskError("The metrics 'perplexity' and 'bits_per_byte' are for tasks of the kind causal_lm.") from error
    return float(table[:, 0].sum()), float(table[:, 1].sum())


@metric
def perplexity(measured: Measured) -> dict[str, float]:
    """Return the exponential of the mean negative log-likelihood of all tokens; infinite where it is too large for a number."""
    total, tokens = _likelihood(measured.answers)
    mean = total / tokens
    return {"perplexity": math.exp(mean) if mean < 700 else math.inf}


@metric
def bits_per_byte(measured: Measured) -> dict[str, float]:
    """Return the negative log-likelihood of the text in bits, divided by its bytes in UTF-8; no tokenizer changes it."""
    total, _ = _likelihood(measured.answers)
    return {"bits_per_byte": total / math.log(2) / sum(measured.references)}
