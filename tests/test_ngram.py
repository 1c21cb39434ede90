"""Model-free drafters: the automaton against brute force, the prediction against planted edits."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specinfer.draft.automaton import MAX_LINKS, MAX_PICKS, NOTHING, Match, SuffixAutomaton
from specinfer.draft.base import Draft, Pick
from specinfer.draft.ngram import NgramDrafter
from specinfer.draft.prediction import PredictionDrafter
from specinfer.models.folder import resolve_model
from specinfer.text.tokenizer import Tokenizer
from specinfer.tree import TokenTree
from tests.engines import run_pages

DATA = Path(__file__).parent / "data"
VOCAB = 5000
PROMPT = [VOCAB + 1, VOCAB + 2]

Drafter = NgramDrafter | PredictionDrafter

# Fewer tokens than MAX_LINKS: nothing is bounded, so brute force has to agree exactly
texts = st.lists(st.integers(0, 2), max_size=MAX_LINKS - 2)
paths = st.lists(st.integers(0, 3), max_size=8)


def occurrences(text: list[int], string: list[int]) -> list[int]:
    """Where a string ends in a text: one past its last token."""
    size = len(string)
    return [stop for stop in range(size, len(text) + 1) if text[stop - size : stop] == string]


def longest_suffix(whole: list[int], text: list[int]) -> list[int]:
    """The longest suffix of `whole` that occurs in `text`."""
    return next(
        whole[start:] for start in range(len(whole) + 1) if occurrences(text, whole[start:])
    )


def followers(text: list[int], string: list[int]) -> list[int]:
    """What came after each occurrence of a string."""
    return [text[stop] for stop in occurrences(text, string) if stop < len(text)]


def draft_of(
    tokens: list[int], path: list[int], *, key: int = 0, prediction: Sequence[int] = ()
) -> Draft:
    """A draft whose tree is one path below the root."""
    tree, node = TokenTree(tokens[-1]), 0
    for token in path:
        node = tree.add(node, token)
    return Draft(key, tokens, run_pages(1), tree, prediction)


def ask(drafter: Drafter, draft: Draft) -> list[list[Pick]]:
    """The picks after every node of a draft's path, expanded node by node."""
    return [drafter.expand([(draft, [node])])[0] for node in range(len(draft.tree))]


def check(picks: list[Pick]) -> None:
    """What every list of picks keeps to."""
    weights = [weight for _, weight in picks]
    assert len({token for token, _ in picks}) == len(picks) <= MAX_PICKS
    assert all(0 < weight < 1 for weight in weights)
    assert sum(weights) < 1
    assert weights == sorted(weights, reverse=True)


@given(texts)
def test_match_is_the_longest_suffix_that_occurred_before(text: list[int]) -> None:
    automaton = SuffixAutomaton(text)
    match = automaton.match
    suffix = longest_suffix(text, text[:-1])
    assert match.length == len(suffix)
    assert set(automaton.transitions[match.state]) == set(followers(text, suffix))


@given(texts)
def test_states_know_how_often_and_where_first(text: list[int]) -> None:
    automaton = SuffixAutomaton(text)
    for start in range(len(text)):
        match = NOTHING
        for stop in range(start + 1, len(text) + 1):
            match = automaton.walk(match, text[stop - 1])
            stops = occurrences(text, text[start:stop])
            assert match.length == stop - start
            assert automaton.counts[match.state] == len(stops)
            assert automaton.ends[match.state] == stops[0] - 1


@given(texts, paths)
def test_a_node_asks_what_the_text_with_its_path_would_ask(
    text: list[int], path: list[int]
) -> None:
    """Except that a path is not yet part of the text in which matches are looked for."""
    automaton = SuffixAutomaton(text)
    match = automaton.match
    for token in path:
        match = automaton.walk(match, token)
    whole = text + path
    suffix = longest_suffix(whole, text if path else text[:-1])
    assert match.length == len(suffix)
    assert set(automaton.transitions[match.state]) == set(followers(text, suffix))
    copy = SuffixAutomaton(whole).match
    assert copy.length >= match.length
    if occurrences(text, whole[len(whole) - copy.length :]) and path:
        assert copy.length == match.length


@given(texts.filter(bool), paths)
def test_picks_hold_what_followed_the_longest_context(text: list[int], path: list[int]) -> None:
    draft = draft_of(text, path)
    for depth, picks in enumerate(ask(NgramDrafter(), draft)):
        check(picks)
        whole = text + path[:depth]
        suffix = longest_suffix(whole, text if depth else text[:-1])
        while suffix and not followers(text, suffix):
            suffix = suffix[1:]
        if suffix:
            assert {token for token, _ in picks} >= set(followers(text, suffix))
        else:
            assert picks == []


@given(texts.filter(bool), st.lists(st.integers(1, 9), max_size=9), paths)
def test_reading_in_pieces_is_reading_at_once(
    text: list[int], pieces: list[int], path: list[int]
) -> None:
    drafter = NgramDrafter()
    for stop in np.cumsum(pieces).tolist():  # paths that come to nothing leave nothing behind
        ask(drafter, draft_of(text[:stop], path))
    assert ask(drafter, draft_of(text, path)) == ask(NgramDrafter(), draft_of(text, path))


class CountingList(list):  # type: ignore[type-arg]
    """Counts how often it is read."""

    num_reads = 0

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        self.num_reads += 1
        return super().__getitem__(index)


def read_counting(text: list[int]) -> tuple[SuffixAutomaton, CountingList]:
    """An automaton over a text, and its suffix links: every one followed is one read."""
    automaton = SuffixAutomaton()
    links = automaton.links = CountingList([-1])  # type: ignore[assignment]
    for token in text:
        automaton.append(token)
    return automaton, links


@pytest.mark.parametrize("kind", ["random", "run", "period", "copies"])
def test_appending_is_linear_whatever_the_text(kind: str) -> None:
    num_tokens = 4000
    random = np.random.default_rng(1).integers(0, 3, num_tokens).tolist()
    text = {
        "random": random,
        "run": [1] * num_tokens,
        "period": [1, 2, 3, 4] * (num_tokens // 4),
        "copies": random[:500] * (num_tokens // 500),
    }[kind]
    automaton, links = read_counting(text)
    assert len(automaton.links) <= 2 * num_tokens
    assert sum(map(len, automaton.transitions)) <= 3 * num_tokens
    assert links.num_reads <= (MAX_LINKS + 3) * num_tokens


def test_no_node_falls_further_than_it_may() -> None:
    automaton, links = read_counting([7, *[1] * 4000])
    match, links.num_reads = automaton.match, 0
    assert match.length == 3999
    assert automaton.walk(match, 2) == NOTHING
    assert automaton.walk(match, 7).length == 1
    assert links.num_reads <= 2 * MAX_LINKS


def test_what_followed_more_often_comes_first() -> None:
    text = [1, 2, 1, 3, 1, 2, 1, 2, 1]
    picks = NgramDrafter().expand([(draft_of(text, []), [0])])[0]
    assert [token for token, _ in picks][:2] == [2, 3]


def test_a_longer_match_weighs_more_and_a_single_token_little() -> None:
    text = list(range(20))
    weights = []
    for length in (1, 2, 4, 6):
        picks = NgramDrafter().expand([(draft_of([*text, *text[5 : 5 + length]], []), [0])])[0]
        assert [token for token, _ in picks] == [5 + length]
        weights.append(picks[0][1])
    assert weights == sorted(weights)
    assert weights[0] < 0.3 < 0.5 < weights[-1]


def test_shorter_contexts_share_what_longer_ones_leave() -> None:
    alone = NgramDrafter().expand([(draft_of([2, 8, 5, 1, 2], []), [0])])[0]
    below = NgramDrafter().expand([(draft_of([2, 8, 1, 2, 9, 5, 1, 2], []), [0])])[0]
    assert [token for token, _ in alone] == [8]
    assert [token for token, _ in below] == [9, 8]
    assert below[1][1] < 0.3 * alone[0][1], "a longer context that fails speaks against it"
    both = [*[1, 2, 9] * 5, *[3, 2, 8] * 50, 1, 2]
    check(NgramDrafter().expand([(draft_of(both, []), [0])])[0])


def test_a_loop_is_found_at_once_and_soon_trusted() -> None:
    text = [9, *[1, 2, 3] * 5]
    last = [picks[0] for picks in ask(NgramDrafter(), draft_of(text, [1, 2, 3, 1]))]
    assert [token for token, _ in last] == [1, 2, 3, 1, 2]
    assert all(weight > 0.8 for _, weight in last)


def test_weights_are_honest_on_real_text() -> None:
    """Among picks of weight near w about w are right; measured within 0.12, mostly 0.05."""
    tokenizer = Tokenizer.from_folder(resolve_model("zoo:parley"))
    lines = (DATA / "conversations.jsonl").read_text(encoding="utf-8").splitlines()[:150]
    weights, right = [], []
    for line in lines:
        text = "\n\n".join(message["content"] for message in json.loads(line)["messages"])
        automaton = SuffixAutomaton()
        for token in tokenizer.encode(text):
            for guess, weight in automaton.picks(automaton.match):
                weights.append(weight)
                right.append(guess == token)
            automaton.append(token)
    bins = np.digitize(weights, [0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9])
    for each in range(8):
        chosen = bins == each
        assert chosen.sum() > 300
        assert abs(np.mean(np.array(weights)[chosen]) - np.mean(np.array(right)[chosen])) < 0.12


def random_text(num_tokens: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, num_tokens).tolist()


def edited(text: list[int], kind: str, every: int = 20, run: int = 1) -> list[int]:
    """A text with `run` tokens substituted, inserted or deleted once per `every` tokens."""
    rng, result = np.random.default_rng(3), []
    for start in range(0, len(text), every):
        cut = int(rng.integers(0, every - run))
        piece = text[start : start + every]
        new = [] if kind == "delete" else rng.integers(0, VOCAB, run).tolist()
        result += piece[:cut] + new + piece[cut if kind == "insert" else cut + run :]
    return result


def tokens_per_step(prediction: list[int], output: list[int], depth: int = 8) -> float:
    """Output per step where the chain of first picks is verified and one token comes on top."""
    drafter, done, num_steps = PredictionDrafter(), 0, 0
    while done < len(output):
        tokens = PROMPT + output[:done]
        draft, node = draft_of(tokens, [], prediction=prediction), 0
        for _ in range(depth):
            picks = drafter.expand([(draft, [node])])[0]
            if not picks:
                break
            node = draft.tree.add(node, picks[0][0])
        for accepted in draft.tree.path(node):
            if output[done : done + 1] != [draft.tree.tokens[accepted]]:
                break
            done += 1
        done += 1
        num_steps += 1
    return len(output) / num_steps


def after(prediction: list[int], output: list[int]) -> list[Pick]:
    """The root's picks after an output, committed token by token."""
    drafter = PredictionDrafter()
    for stop in range(len(output) + 1):
        draft = draft_of(PROMPT + output[:stop], [], prediction=prediction)
        picks = drafter.expand([(draft, [0])])[0]
        check(picks)
    return picks


# 9 is the most; a chain that must stop at each edit and be right at once after it makes 6.67
@pytest.mark.parametrize(
    ("kind", "run", "bar"),
    [
        ("substitute", 1, 6.4),
        ("delete", 1, 6.4),
        ("insert", 1, 4.8),  # the first guess after an unknown token is that it replaced one
        ("substitute", 3, 4.4),
        ("delete", 3, 6.4),
        ("insert", 3, 3.8),
    ],
)
def test_planted_edits_cost_little(kind: str, run: int, bar: float) -> None:
    text = random_text(1000)
    assert tokens_per_step(text, text) == pytest.approx(9, abs=0.1)
    assert tokens_per_step(text, edited(text, kind, run=run)) > bar


def test_the_output_is_expected_to_begin_as_predicted() -> None:
    text = random_text(50)
    assert after(text, [])[0][0] == text[0]


def test_right_after_an_edit_the_prediction_goes_on() -> None:
    text = random_text(50)
    unknown = [*text[:20], VOCAB]
    substituted, inserted = after(text, unknown)[:2]
    assert (substituted[0], inserted[0]) == (text[21], text[20])
    assert substituted[1] > inserted[1] > 0.05
    assert after(text, [*text[:20], text[21]])[0][0] == text[22], "one token was left out"
    assert after(text, [*unknown, text[20]])[0][0] == text[21], "it was an insertion"


def test_places_that_a_token_confirms_alike_are_all_kept() -> None:
    text = [10, 11, 7, 7, 8, 9]
    guesses = dict(after(text, [10, 11, 99, 7]))
    assert guesses[8] > guesses[7] > 0.05, "99 replaced a 7, or stands before it"


def test_a_match_at_several_places_says_less_about_each() -> None:
    text, other = random_text(100), random_text(6, seed=1)
    once = dict(after(text, other + text[40:42]))
    twice = dict(after(text + text[:50], other + text[40:42]))
    assert once[text[42]] > 1.2 * twice[text[42]]


def test_a_long_omission_and_a_step_back_are_found_after_a_few_tokens() -> None:
    text = random_text(200)
    assert after(text, [*text[:20], *text[120:123]])[0][0] == text[123]
    assert after(text, [*text[:120], *text[20:23]])[0][0] == text[23]


def test_an_unrelated_prediction_soon_weighs_nothing_and_recovers() -> None:
    text, other = random_text(100), random_text(30, seed=1)
    for length in range(8, 30):
        assert sum(weight for _, weight in after(text, other[:length])) < 0.05
    found = [after(text, other + text[40 : 40 + length])[0] for length in (3, 4, 6)]
    assert [token for token, _ in found] == [text[43], text[44], text[46]]
    assert found[1][1] > 0.5
    assert found[2][1] > found[1][1]


def test_many_edits_lower_the_weight_of_what_is_predicted() -> None:
    """The running hit rate: one edit in four tokens is not one in forty."""
    text = random_text(800)
    weights = []
    for every in (4, 40):
        output = edited(text, "substitute", every=every)[:400]
        weights.append(max(after(text, output[:stop])[0][1] for stop in (396, 398, 400)))
    assert weights[0] < 0.9 < weights[1]


@given(st.lists(st.integers(0, 2), max_size=12), texts, paths)
@settings(max_examples=50)
def test_a_node_believes_what_committing_its_path_would_make_believe(
    prediction: list[int], output: list[int], path: list[int]
) -> None:
    drafter = PredictionDrafter()
    drafter.expand([(draft_of(PROMPT, [], prediction=prediction), [0])])
    draft = draft_of(PROMPT + output, path, prediction=prediction)
    *_, deepest = ask(drafter, draft)
    check(deepest)
    assert deepest == after(prediction, output + path)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=20), texts, st.data())
@settings(max_examples=50)
def test_a_step_skipped_changes_nothing(
    prediction: list[int], output: list[int], data: st.DataObject
) -> None:
    stops = data.draw(st.lists(st.integers(0, len(output)), max_size=3).map(sorted))
    drafter = PredictionDrafter()
    for stop in [0, *stops]:
        drafter.expand([(draft_of(PROMPT + output[:stop], [1], prediction=prediction), [0])])
    picks = drafter.expand([(draft_of(PROMPT + output, [], prediction=prediction), [0])])[0]
    assert picks == after(prediction, output)


def test_who_begins_late_finds_the_place() -> None:
    text = random_text(100)
    drafter = PredictionDrafter()
    for stop in range(40, 45):
        picks = drafter.expand([(draft_of(PROMPT + text[:stop], [], prediction=text), [0])])[0]
    assert picks[0][0] == text[44]


def test_without_a_prediction_nothing_is_proposed_or_kept() -> None:
    drafter = PredictionDrafter()
    draft = draft_of(PROMPT, [3, 4])
    assert drafter.expand([(draft, [0])]) == [[]]
    assert drafter.expand([(draft, [1, 2])]) == [[], []]
    assert drafter._states == {}


@pytest.mark.parametrize("make", [NgramDrafter, PredictionDrafter])
def test_a_dropped_request_is_forgotten(make: type[Drafter]) -> None:
    drafter, text = make(), [7, 8, 9] * 3
    drafter.drop(0)  # never seen: it may have ended before it was drafted for
    for tokens in (PROMPT, PROMPT + text[:7]):
        ask(drafter, draft_of(tokens, [], prediction=text))
    drafter.drop(0)
    new = draft_of([5, 6, 5], [6], prediction=[1, 2, 3])  # another request under the same key
    assert ask(drafter, new) == ask(make(), new)
    assert ask(make(), new)[0][0][0] in (6, 1)


@pytest.mark.parametrize("make", [NgramDrafter, PredictionDrafter])
def test_requests_are_answered_in_their_order_and_apart(make: type[Drafter]) -> None:
    prediction = random_text(30)
    outputs = [[1, 2, 1, 2, 1], [3, 4, 3], prediction[:10]]
    drafts = [
        draft_of(PROMPT + output, [1, 2], key=key, prediction=prediction)
        for key, output in enumerate(outputs)
    ]
    together, alone = make(), [make() for _ in drafts]
    for nodes in ([0], [1], [2]):
        separate = [
            one.expand([(draft, nodes)])[0] for one, draft in zip(alone, drafts, strict=True)
        ]
        assert together.expand([(draft, nodes) for draft in drafts]) == separate
    together.admit([(draft, [1]) for draft in drafts])


@pytest.mark.parametrize("make", [NgramDrafter, PredictionDrafter])
def test_branches_of_one_tree_do_not_mix(make: type[Drafter]) -> None:
    prediction = random_text(30)
    tokens = [*PROMPT, *prediction[:10], *prediction[:5]]
    tree = TokenTree(tokens[-1])
    right, wrong = tree.add(0, prediction[5]), tree.add(0, VOCAB)
    deeper = [tree.add(right, prediction[6]), tree.add(wrong, prediction[5])]
    draft = Draft(0, tokens, run_pages(1), tree, prediction)
    drafter = make()
    drafter.expand([(draft, [0])])
    level = drafter.expand([(draft, [right, wrong])])
    level += drafter.expand([(draft, deeper)])
    paths = [[prediction[5]], [VOCAB], [prediction[5], prediction[6]], [VOCAB, prediction[5]]]
    assert level == [
        ask(make(), draft_of(tokens, path, prediction=prediction))[-1] for path in paths
    ]


def test_a_match_of_nothing_picks_nothing() -> None:
    assert SuffixAutomaton().match == NOTHING == Match(0, 0)
    assert SuffixAutomaton([1, 2, 3]).picks(NOTHING) == []
