"""The demonstration: what it makes of the reviews and sayings, and how it measures, but not how well it does."""

import math

import pytest
import torch
from test_model import small

from extras.demo import JUDGE, RIDDLE, WRITE, Classifier, features, is_held_out, make_rows, read_reviews, read_riddles
from extras.demo import log_probability as of_answers


@pytest.fixture(scope="module")
def material():
    return read_reviews(), read_riddles()


def test_no_held_out_review_is_trained_on_and_each_other_one_once(material):
    reviews, riddles = material
    chats, pairs = make_rows(reviews, riddles[:50])
    turns = [[message["content"] for message in row["messages"]] for row in chats]
    written = [answer for question, answer in turns if question in WRITE.values()]
    judged = [question.removeprefix(JUDGE) for question, _ in turns if question.startswith(JUDGE)]
    compared = [pair[side] for pair in pairs for side in ("chosen", "rejected")]
    used = written + judged + compared
    known = {label: {text for text in texts if not is_held_out(text)} for label, texts in reviews.items()}
    assert len(used) == len(set(used)) and set(used) <= known["good"] | known["bad"]
    assert len(set(used)) > 0.8 * (len(known["good"]) + len(known["bad"]))
    assert all(pair["chosen"] in known["good"] and pair["rejected"] in known["bad"] for pair in pairs)
    for question, answer in turns:
        if question.startswith(JUDGE):
            assert (answer == "好评。") == (question.removeprefix(JUDGE) in known["good"])
        if question == WRITE["good"]:
            assert answer in known["good"]
    sayings = [(question.removeprefix(RIDDLE), answer) for question, answer in turns if question.startswith(RIDDLE)]
    assert sorted(sayings) == sorted(riddles[:50])


def test_riddles_have_one_answer_each(material):
    _, riddles = material
    assert len({riddle for riddle, _ in riddles}) == len(riddles) > 10_000
    assert all("\t" not in text and "\r" not in text and text for pair in riddles for text in pair)


@pytest.mark.quick
def test_the_classifier_is_naive_bayes():
    reviews = {"good": ["好书", "好"], "bad": ["坏书"]}
    classifier = Classifier(reviews)
    assert features("好书") == {"好", "书", "好书"}
    expected = math.log(2 / 1) + math.log((2 + 1) / 4 / (1 / 3)) + math.log(1 / 4 / (1 / 3))
    weights = classifier.weights | {"差": math.log((0 + 1) / 4 / ((0 + 1) / 3))}
    assert classifier.bias + weights["好"] + weights["差"] == pytest.approx(expected)
    assert classifier.is_good("好") and not classifier.is_good("坏书")


@pytest.mark.quick
def test_log_probabilities_of_sampled_answers_are_those_of_each_alone():
    class Tokens:
        eos_id = 1

        @staticmethod
        def encode_chat(messages, open_turn):
            return [2, 3, 4], [0, 0, 0]

    model = small()
    sampled = [[7, 8, 9, 5], [6, 5]]
    got = of_answers(model, Tokens, "", sampled)
    for row, total in zip(sampled, got):
        ids = torch.tensor([[1, 2, 3, 4, *row]])
        log_p = model(ids[:, :-1])[0].log_softmax(-1)
        expected = sum(log_p[3 + i, token] for i, token in enumerate(row))
        torch.testing.assert_close(total, expected, rtol=0, atol=1e-10)
